"""AWQ, version ``gemm``: asymmetric groups of 4 bits, which more engines load than any other file.

One quantized linear::

    qweight  int32 [I, O/8]   integers q: a word holds one input channel of eight outputs
    qzeros   int32 [G, O/8]   zero points z, in words of the same kind, as they are
    scales   f16   [G, O]
    bias           [O]        if the layer has one

    w[o, i] = (q[o, i] - z[g, o]) * scales[g, o],   g = i // group_size

Bits ``4j`` to ``4j + 3`` of word ``c`` are of output ``8c + ORDER[j]``, ``ORDER = 0, 2, 4, 6, 1, 3, 5, 7``: a
kernel takes even and odd outputs apart with two shifts. A symmetric grid has ``z = 8``, written like any
other.

Left out: the versions ``gemv`` and ``gemv_fast``, and other widths, which hardly anything loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import PreflightError
from engine.export.layout import Layout, Linears, finite_scale, group_sizes, require_one_grid
from engine.export.reader import CheckpointReader, PlainLinear, damaged, regular_groups
from engine.export.unpacking import as_words
from engine.quant.packed import PackedWeight
from engine.quant.packing import bitpack

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

_LOADING = """## Loading

AWQ, version gemm, 4 bits. With transformers and gptqmodel:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", device_map="auto")
```

With vLLM:

```python
from vllm import LLM

model = LLM("path/to/this/directory")
```
"""


class AWQ(Layout):
    """How ``awq`` keeps quantized linears: one grid of 4 bits for the whole model."""

    tags = ("awq",)

    def tensors(self, prefix: str, weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
        if weight.bits != 4 or weight.out_features % 8:
            raise PreflightError(
                f"{weight.out_features} output channels of {weight.bits} bits: awq holds 4 bits, and eight "
                "outputs a word",
                where=prefix,
                hint="choose compressed-tensors",
            )
        yield f"{prefix}.qweight", _words(weight.codes())
        yield f"{prefix}.qzeros", _words(weight.zero_point)
        yield f"{prefix}.scales", finite_scale(prefix, weight).t().contiguous()

    def config(self, linears: Linears) -> dict[str, Any]:
        grid = require_one_grid(linears, self.format.name)
        return {
            "quant_method": "awq",
            "bits": grid.bits,
            "group_size": group_sizes(linears)[0],
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }

    def loading(self, config: Mapping[str, Any], blocks_name: str) -> str:
        return _LOADING

    def reader(self, directory: Path) -> AWQReader:
        return AWQReader(directory)


def _words(values_OX: Tensor) -> Tensor:
    """``[X, O/8]``: numbers of eight outputs a word, in the format's order."""
    values_XO = values_OX.t()
    ordered = values_XO.reshape(len(values_XO), -1, len(ORDER))[..., list(ORDER)]
    return bitpack(ordered.reshape(values_XO.shape), 4, dim=1)


class AWQReader(CheckpointReader):
    """Reads a quantized linear, written from the description above alone."""

    format = "awq"
    suffixes = ("qweight", "qzeros", "scales")
    bits = 4

    def understand(self) -> None:
        said = self.quantization
        version = str(said.get("version") or said.get("format") or said.get("checkpoint_format")).lower()
        if (said.get("quant_method"), version) != ("awq", "gemm") or said.get("bits") != 4:
            raise PreflightError(
                f"it is {version[:40]} of {str(said.get('quant_method') or 'nobody')[:40]} with "
                f"{str(said.get('bits'))[:8]} bits, and only 4-bit awq files of the version gemm can be read "
                "back",
                where=str(self.directory),
                hint="open an export/awq directory of a run",
            )

    def linear(self, prefix: str) -> PlainLinear:
        return awq_linear(self, prefix)

    def linear_shape(self, prefix: str) -> tuple[int, int]:
        return awq_shape(self, prefix)


def awq_linear(reader: CheckpointReader, prefix: str) -> PlainLinear:
    """A linear in AWQ's words."""
    codes, zeros = (_fields(reader, f"{prefix}.{part}") for part in ("qweight", "qzeros"))
    scale = reader.stored(f"{prefix}.scales").t().contiguous()
    inputs, groups = codes.shape[1], zeros.shape[1]
    if scale.shape != zeros.shape or not groups or inputs % groups:
        raise damaged(reader.directory, f"the tensors of {prefix} do not fit together")
    return PlainLinear(codes, zeros, scale, regular_groups(inputs, groups))


def awq_shape(reader: CheckpointReader, prefix: str) -> tuple[int, int]:
    """Outputs and inputs of a linear in AWQ's words."""
    inputs, words = reader.stored_shape(f"{prefix}.qweight")
    return 8 * words, inputs


def _fields(reader: CheckpointReader, name: str) -> Tensor:
    """uint8 ``[O, X]`` of words ``[X, O/8]``."""
    words = as_words(reader.stored(name).numpy())
    fields = np.empty((8 * words.shape[1], words.shape[0]), dtype=np.uint8)
    for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        fields[output::8] = ((words >> np.uint32(4 * place)) & np.uint32(15)).T
    return torch.from_numpy(fields)
