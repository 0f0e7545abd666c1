"""auto-round: the words of GPTQ v2 under a configuration of its own, which also computes on a CPU.

One quantized linear::

    qweight  int32 [I*b/32, O]   integers q, a little-endian bit stream down each column (output channel)
    qzeros   int32 [G, O*b/32]   zero points z, a little-endian bit stream along each row, stored as they are
    scales   f16   [G, O]
    bias           [O]           if the layer has one

    w[o, i] = (q[o, i] - z[g, o]) * scales[g, o],   g = i // group_size

In a stream, element ``j`` occupies bits ``[b*j, b*j + b)`` and word ``k`` holds bits ``[32k, 32k + 32)``.
That zero points are as they are, ``packing_format: auto_round:gptqmodel`` says; ``auto_round:auto_gptq``
would be ``z - 1`` and is for symmetric grids, ``auto_round:auto_awq`` has AWQ's words: others write these,
and they are read. Unlike GPTQ files these have no list of the inputs' groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import PreflightError
from engine.export.awq import awq_linear, awq_shape
from engine.export.gptq import more_by_one
from engine.export.gptq_v2 import GPTQv2Reader, gptq_tensors
from engine.export.layout import Layout, Linears, blocks_of, group_sizes, require_one_grid
from engine.export.reader import PlainLinear, damaged, number_of_bits, regular_groups
from engine.quant.packed import PackedWeight

LIBRARY = "0.16.1"
"""The release of auto-round whose layout this is, as it writes it into what it saves."""
PACKING = "auto_round:gptqmodel"
METHODS = ("auto-round", "intel/auto-round")
"""What the library has called itself."""
AS_THEY_ARE = (PACKING, "auto_round")
LESS_ONE = ("auto_round:auto_gptq", "auto_round:gptq")
AS_IN_AWQ = ("auto_round:auto_awq", "auto_round:awq")
"""Packings by how zero points are stored."""

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


class AutoRoundReader(GPTQv2Reader):
    """Reads a quantized linear, written from the description above alone; and those of auto-round's other
    packings, less one or as in AWQ, which it writes itself."""

    format = "auto-round"
    suffixes = ("qweight", "qzeros", "scales")

    def understand(self) -> None:
        method = str(self.quantization.get("quant_method"))
        packing = str(self.quantization.get("packing_format") or self.quantization.get("backend"))
        if method not in METHODS or packing not in (*AS_THEY_ARE, *LESS_ONE, *AS_IN_AWQ):
            raise PreflightError(
                f"it is {packing[:40]} of {method[:40]}, and only auto-round files packed as {PACKING} and "
                "the like can be read back",
                where=str(self.directory),
                hint="open an export/auto-round directory of a run",
            )
        self.bits = number_of_bits(self.directory, self.quantization.get("bits"))
        self.packing = packing
        if packing in AS_IN_AWQ and self.bits != 4:
            raise damaged(self.directory / "config.json", f"{packing} of {self.bits} bits is no packing")

    def linear(self, prefix: str) -> PlainLinear:
        return awq_linear(self, prefix) if self.packing in AS_IN_AWQ else super().linear(prefix)

    def true_zeros(self, prefix: str, stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
        return more_by_one(self, prefix, stored, bits) if self.packing in LESS_ONE else stored

    def groups(self, prefix: str) -> Tensor:
        return regular_groups(self.linear_shape(prefix)[1], self.stored_shape(f"{prefix}.scales")[0])

    def linear_shape(self, prefix: str) -> tuple[int, int]:
        return awq_shape(self, prefix) if self.packing in AS_IN_AWQ else super().linear_shape(prefix)
