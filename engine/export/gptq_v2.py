"""GPTQ v2: the packed checkpoint that most loaders of 2, 3, 4 and 8-bit asymmetric weights read.

One quantized linear::

    qweight  int32 [I*b/32, O]   integers q, a little-endian bit stream down each column (output channel)
    qzeros   int32 [G, O*b/32]   zero points z, a little-endian bit stream along each row, stored as they are
    scales   f16   [G, O]
    g_idx    int32 [I]           the group of each input channel
    bias     f16   [O]           if the layer has one

    w[o, i] = (q[o, i] - z[g_idx[i], o]) * scales[g_idx[i], o]

In a stream, element ``j`` occupies bits ``[b*j, b*j + b)`` and word ``k`` holds bits ``[32k, 32k + 32)``; at
3 bits elements straddle words. Our own packed words run along the input with the same stream, so ``qweight``
is their transpose.

What makes it version 2 is that zero points are stored as they are. Version 1 stores ``z - 1``, which has no
field value for ``z = 0``, and training produces ``z = 0`` often.

:class:`GPTQv2` writes and :class:`GPTQv2Reader` reads; the one shares no code with the other, so that an
error of either is seen. EfficientQAT's own files are of this version too, but that their words hold whole
integers (ten of 3 bits) and that their config.json says nothing of it: there the shapes tell the bits. Left
out: activation order (``desc_act``), and version 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine import __version__
from engine.config.grid import BITS
from engine.errors import PreflightError
from engine.export.layout import Layout, Linears, finite_scale, group_sizes, require_one_grid
from engine.export.reader import CheckpointReader, PlainLinear, damaged, number_of_bits
from engine.export.unpacking import unpack_values, words_of
from engine.quant.packed import PackedWeight
from engine.quant.packing import bitpack

VERSION_KEYS = ("checkpoint_format", "format", "quant_method")
"""Where a description says of which version a file is; the first that is there counts."""

_LOADING = """## Loading

GPTQ v2 (zero points stored as they are), true {bits}-bit packing. With gptqmodel:

```python
from gptqmodel import GPTQModel

model = GPTQModel.load("path/to/this/directory")
```

With transformers and optimum plus gptqmodel installed:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```

The format `auto-round` of eqat has the same words for auto-round, also on a CPU.
"""


class GPTQv2(Layout):
    """How ``gptq_v2`` keeps quantized linears: one grid for the whole model."""

    tags = ("gptq",)

    def tensors(self, prefix: str, weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
        yield from gptq_tensors(self.format.name, prefix, weight, weight.zero_point)
        yield f"{prefix}.g_idx", torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size

    def config(self, linears: Linears) -> dict[str, Any]:
        grid = require_one_grid(linears, self.format.name)
        return {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": group_sizes(linears)[0],
            "desc_act": False,
            "sym": grid.symmetric,
            "lm_head": False,
            "checkpoint_format": self.format.name,
            "format": self.format.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"eqat:{__version__}"]},
        }

    def files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        return {"quantize_config.json": config}

    def loading(self, config: Mapping[str, Any], blocks_name: str) -> str:
        return _LOADING.format(bits=config["bits"])

    def reader(self, directory: Path) -> CheckpointReader:
        return GPTQv2Reader(directory)


def gptq_tensors(
    format: str, prefix: str, weight: PackedWeight, zeros_OG: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """``qweight``, ``qzeros`` and ``scales``, for each format that has them; ``zeros_OG`` as stored."""
    if weight.out_features * weight.bits % 32:
        raise PreflightError(
            f"{weight.out_features} output channels of {weight.bits} bits do not fill whole 32-bit "
            f"words, which {format} needs for the zero points",
            where=prefix,
            hint="choose 8 bits, or 4 when the outputs are a multiple of 8",
        )
    yield f"{prefix}.qweight", weight.words.t().contiguous()
    yield f"{prefix}.qzeros", bitpack(zeros_OG.t().contiguous(), weight.bits, dim=1)
    yield f"{prefix}.scales", finite_scale(prefix, weight).t().contiguous()


class GPTQv2Reader(CheckpointReader):
    """Reads a quantized linear, written from the description above alone."""

    format = "gptq_v2"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def understand(self) -> None:
        if not self.quantization:
            self.bits = None
            return
        found = version_in(self.quantization)
        if found != "gptq_v2":
            raise PreflightError(
                f"checkpoint format is {found[:40] or 'not stated'}, only gptq_v2 can be read back",
                where=str(self.directory),
                hint="open an export/gptq_v2 directory of a run",
            )
        self.bits = number_of_bits(self.directory, self.quantization.get("bits"))

    def linear(self, prefix: str) -> PlainLinear:
        bits = self.bits_of(prefix)
        outputs, inputs = self.linear_shape(prefix)
        codes = unpack_values(self.stored(f"{prefix}.qweight").numpy().T, bits, inputs)
        zeros = unpack_values(self.stored(f"{prefix}.qzeros").numpy(), bits, outputs)
        return PlainLinear(
            codes_OI=torch.from_numpy(codes),
            zero_OG=torch.from_numpy(self.true_zeros(prefix, zeros, bits)).t().contiguous(),
            scale_OG=self.stored(f"{prefix}.scales").t().contiguous(),
            group_of_I=self.groups(prefix),
        )

    def true_zeros(self, prefix: str, stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
        """Zero points, where the file holds ``stored``."""
        return stored

    def groups(self, prefix: str) -> Tensor:
        """The group of each input."""
        return self.stored(f"{prefix}.g_idx")

    def linear_shape(self, prefix: str) -> tuple[int, int]:
        rows, outputs = self.stored_shape(f"{prefix}.qweight")
        inputs = rows * 32 // self.bits_of(prefix)
        if f"{prefix}.g_idx" in self:  # which tells it where words have gaps, too
            (count,) = self.stored_shape(f"{prefix}.g_idx")
            inputs = count if rows in words_of(count, self.bits_of(prefix)) else inputs
        return outputs, inputs

    def bits_of(self, prefix: str) -> int:
        if self.bits is not None:
            return self.bits
        (rows, outputs), (inputs,) = (self.stored_shape(f"{prefix}.{part}") for part in ("qweight", "g_idx"))
        columns = self.stored_shape(f"{prefix}.qzeros")[-1]
        found = [
            bits for bits in BITS if rows in words_of(inputs, bits) and columns in words_of(outputs, bits)
        ]
        if len(found) != 1:
            raise damaged(self.directory, f"the shapes of {prefix} do not tell the bits of its integers")
        return found[0]


def version_in(quantization: Mapping[str, Any]) -> str:
    """What a GPTQ file says of its version; those that say nothing are of the first."""
    return str(next((quantization[key] for key in VERSION_KEYS if quantization.get(key)), ""))
