"""GPTQ, version 1: what older loaders of GPTQ files read, for models without a zero point of zero.

One quantized linear::

    qweight  int32 [I*b/32, O]   integers q, a little-endian bit stream down each column (output channel)
    qzeros   int32 [G, O*b/32]   zero points less one, z - 1, a little-endian bit stream along each row
    scales   f16   [G, O]
    g_idx    int32 [I]           the group of each input channel
    bias           [O]           if the layer has one

    w[o, i] = (q[o, i] - z[g_idx[i], o]) * scales[g_idx[i], o]

In a stream, element ``j`` occupies bits ``[b*j, b*j + b)`` and word ``k`` holds bits ``[32k, 32k + 32)``.

``z = 0`` has no field value: some loaders add one to a whole word, where it carries into the neighbour,
others to each field, where it becomes ``2^b``. So a model with such zero points, which training makes often,
is refused, with their number. gptqmodel reads asymmetric files of this version only where the configuration
says that gptqmodel wrote them (in a release that knows both versions, and converts them as above): its name
stands behind ours for that reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config.formats import nearest
from engine.errors import PreflightError
from engine.export.gptq_v2 import GPTQv2, GPTQv2Reader, gptq_tensors, version_in
from engine.export.layout import DoesNotFit, Linears
from engine.export.reader import CheckpointReader, damaged, number_of_bits
from engine.quant.packed import PackedBlock, PackedWeight

CONVENTION = "gptqmodel:7.7.0"
"""Whose way of storing zero points this is; it asks for itself before it loads an asymmetric file."""

_LOADING = """## Loading

GPTQ version 1 (zero points are stored less one), {bits} bits. With gptqmodel:

```python
from gptqmodel import GPTQModel

model = GPTQModel.load("path/to/this/directory")
```

With transformers and optimum plus gptqmodel installed:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", device_map="auto")
```
"""


class GPTQ(GPTQv2):
    """How ``gptq`` keeps quantized linears: one grid for the whole model, no zero point of zero."""

    def refusal(self, blocks: Iterable[PackedBlock]) -> DoesNotFit | None:
        zeros = groups = 0
        grid = None
        for block in blocks:
            for weight in block.linears.values():
                grid = weight.grid
                zeros += int((weight.zero_point == 0).sum())
                groups += weight.zero_point.numel()
        if not zeros or grid is None:
            return None
        return DoesNotFit(
            f"{zeros} of {groups} zero points are 0, which GPTQ v1 has no value for",
            where=f"export {self.format.name}",
            hint=f"choose {nearest(self.format, grid)}, which holds them: nothing is trained again",
        )

    def tensors(self, prefix: str, weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
        if not weight.zero_point.all():
            raise PreflightError("a zero point is 0, which GPTQ v1 has no value for", where=prefix)
        yield from gptq_tensors(self.format.name, prefix, weight, weight.zero_point - 1)
        yield f"{prefix}.g_idx", torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size

    def config(self, linears: Linears) -> dict[str, Any]:
        config = super().config(linears)
        if not config["sym"]:
            config["meta"]["quantizer"].append(CONVENTION)
        return config

    def loading(self, config: Mapping[str, Any], blocks_name: str) -> str:
        return _LOADING.format(bits=config["bits"])

    def reader(self, directory: Path) -> GPTQReader:
        return GPTQReader(directory)


class GPTQReader(GPTQv2Reader):
    """Reads a quantized linear, written from the description above alone."""

    format = "gptq"

    def understand(self) -> None:
        found = version_in(self.quantization)
        if self.quantization.get("quant_method", "gptq") != "gptq" or found not in ("gptq", ""):
            raise PreflightError(
                f"it is no GPTQ file of version 1 but {found[:40]!r}, and only such can be read back",
                where=str(self.directory),
                hint="open an export/gptq directory of a run",
            )
        self.bits = number_of_bits(self.directory, self.quantization.get("bits"))

    def true_zeros(self, prefix: str, stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
        return more_by_one(self, prefix, stored, bits)


def more_by_one(
    reader: CheckpointReader, prefix: str, stored: NDArray[np.uint8], bits: int
) -> NDArray[np.uint8]:
    """Zero points that were stored less one."""
    if (stored == (1 << bits) - 1).any():
        raise damaged(reader.directory, f"{prefix}.qzeros holds a zero point beyond the grid")
    return stored + np.uint8(1)
