"""An export format of somebody else's package: nothing is packed, and every linear has its own grid.

One quantized linear: ``codes`` uint8 ``[O, I]``, ``zeros`` uint8 and ``steps`` float16 ``[O, G]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config.formats import Format
from engine.config.grid import Grid
from engine.errors import PreflightError
from engine.export.layout import Layout, Linears
from engine.export.reader import CheckpointReader, PlainLinear
from engine.quant.packed import PackedWeight


class Toy(Layout):
    tags = ("toy",)

    def tensors(self, prefix: str, weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}.codes", weight.codes()
        yield f"{prefix}.zeros", weight.zero_point
        yield f"{prefix}.steps", weight.scale

    def config(self, linears: Linears) -> dict[str, Any]:
        groups = {name: [linear.grid.bits, linear.group_size] for name, linear in linears.items()}
        return {"quant_method": "toy", "grids": groups}

    def files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        return {"toy.json": {"linears": len(config["grids"])}}

    def loading(self, config: Mapping[str, Any], blocks_name: str) -> str:
        return f"## Loading\n\nNobody loads {len(config['grids'])} linears of {blocks_name}.\n"

    def reader(self, directory: Path) -> CheckpointReader:
        return ToyReader(directory)


class ToyReader(CheckpointReader):
    format = "toy"
    suffixes = ("codes", "zeros", "steps")

    def understand(self) -> None:
        if self.quantization.get("quant_method") != "toy":
            raise PreflightError("is no toy", where=str(self.directory))

    def linear(self, prefix: str) -> PlainLinear:
        codes, scale = self.stored(f"{prefix}.codes"), self.stored(f"{prefix}.steps")
        groups = torch.arange(codes.shape[1], dtype=torch.int32) // (codes.shape[1] // scale.shape[1])
        return PlainLinear(codes, self.stored(f"{prefix}.zeros"), scale, groups)

    def linear_shape(self, prefix: str) -> tuple[int, int]:
        outputs, inputs = self.stored_shape(f"{prefix}.codes")
        return outputs, inputs


def toy_bytes(outputs: int, inputs: int, bits: int, group_size: int) -> int:
    return outputs * inputs + 3 * outputs * Grid(bits, group_size).groups(inputs)


ROW = Format(
    name="toy",
    label="the toy",
    bits=(2, 3, 4),
    group_sizes=(32, 64),
    symmetric=(False,),
    code="toy_format:Toy",
    tensors=("codes", "zeros", "steps"),
    costs="toy_format:toy_bytes",
    loading="import toy\nmodel = toy.load({path})",
)
