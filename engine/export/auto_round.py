"""auto-round: the words of GPTQ v2 under a configuration of its own, which also computes on a CPU.

One quantized linear::

    qweight  int32 [I*b/32, O]   integers q, a little-endian bit stream down each column (output channel)
    qzeros   int32 [G, O*b/32]   zero points z, a little-endian bit stream along each row, stored as they are
    scales   f16   [G, O]
    bias           [O]           if the layer has one

    w[o, i] = (q[o, i] - z[g, o]) * scales[g, o],   g = i // group_size

In a stream, element ``j`` occupies bits ``[b*j, b*j + b)`` and word ``k`` holds bits ``[32k, 32k + 32)``.
That zero points are as they are, ``packing_format: auto_round:gptqmodel`` says; ``auto_round:auto_gptq``
would be ``z - 1`` and is for symmetric grids. Unlike GPTQ files these have no list of the inputs' groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import PreflightError
from engine.export.gptq_v2 import gptq_tensors
from engine.export.layout import Layout, Linears, blocks_of, group_sizes, require_one_grid
from engine.export.reader import CheckpointReader, PlainLinear, damaged, number_of_bits, unpack_rows
from engine.quant.packed import PackedWeight

LIBRARY = "0.16.1"
"""The release of auto-round whose layout this is, as it writes it into what it saves."""
PACKING = "auto_round:gptqmodel"

_LOADING = """## Loading

auto-round, {bits} bits, zero points stored as they are. With transformers and auto-round, also on a CPU:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", device_map="auto")
```
"""


class AutoRound(Layout):
    """How ``auto-round`` keeps quantized linears: one grid for the whole model."""

    tags = ("auto-round",)

    def tensors(self, prefix: str, weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
        yield from gptq_tensors(self.format.name, prefix, weight, weight.zero_point)

    def config(self, linears: Linears) -> dict[str, Any]:
        grid = require_one_grid(linears, self.format.name)
        return {
            "quant_method": "auto-round",
            "bits": grid.bits,
            "group_size": group_sizes(linears)[0],
            "sym": grid.symmetric,
            "data_type": "int",
            "packing_format": PACKING,
            "autoround_version": LIBRARY,
            "block_name_to_quantize": blocks_of(linears),
        }

    def loading(self, config: Mapping[str, Any], blocks_name: str) -> str:
        return _LOADING.format(bits=config["bits"])

    def reader(self, directory: Path) -> AutoRoundReader:
        return AutoRoundReader(directory)


class AutoRoundReader(CheckpointReader):
    """Reads a quantized linear, written from the description above alone."""

    format = "auto-round"
    suffixes = ("qweight", "qzeros", "scales")

    def understand(self) -> None:
        said = (self.quantization.get("quant_method"), self.quantization.get("packing_format"))
        if said != ("auto-round", PACKING):
            raise PreflightError(
                f"it is {str(said[1] or said[0] or 'not stated')[:40]}, and only auto-round files packed as "
                f"{PACKING} can be read back",
                where=str(self.directory),
                hint="open an export/auto-round directory of a run",
            )
        self.bits = number_of_bits(self.directory, self.quantization.get("bits"))

    def linear(self, prefix: str) -> PlainLinear:
        codes = unpack_rows(self.stored(f"{prefix}.qweight").numpy().T, self.bits)
        zeros = unpack_rows(self.stored(f"{prefix}.qzeros").numpy(), self.bits).T
        inputs, groups = codes.shape[1], zeros.shape[1]
        if not groups or inputs % groups:
            raise damaged(self.directory, f"the tensors of {prefix} do not fit together")
        return PlainLinear(
            codes_OI=torch.from_numpy(codes),
            zero_OG=torch.from_numpy(zeros).contiguous(),
            scale_OG=self.stored(f"{prefix}.scales").t().contiguous(),
            group_of_I=torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
        )

    def linear_shape(self, prefix: str) -> tuple[int, int]:
        words, out_features = self.stored_shape(f"{prefix}.qweight")
        return out_features, words * 32 // self.bits
