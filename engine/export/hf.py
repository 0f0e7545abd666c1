"""The model as 16-bit weights again, for whatever loads a plain Hugging Face checkpoint.

One linear that was quantized::

    weight  [O, I]   (q - z) * s, computed in float32 and rounded once to export.dtype
    bias    [O]      if the layer has one

The grid is still in the values, but the file is as large as the original's: this is for engines that read no
packed format, for comparisons, and for tools that quantize in their own way. A product that float16 cannot
hold is found before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from engine.config.formats import Format
from engine.errors import PreflightError
from engine.export.layout import DoesNotFit, Layout, Linears
from engine.export.reader import CheckpointReader
from engine.export.stored import dtype_name
from engine.quant.packed import PackedBlock, PackedWeight

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

_LOADING = """## Loading

A plain checkpoint: nothing has to be installed beside transformers.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", device_map="auto")
```
"""


class HuggingFace(Layout):
    """How ``hf`` keeps what were quantized linears: as numbers of the type of all else."""

    def __init__(self, row: Format, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(row)
        self.dtype = dtype

    def of(self, lm: CausalLM, dtype: torch.dtype) -> Self:
        return type(self)(self.format, dtype)

    def refusal(self, blocks: Iterable[PackedBlock]) -> DoesNotFit | None:
        most = torch.finfo(self.dtype).max
        if self.dtype != torch.float16:
            return None  # the others reach beyond what a float16 scale and 8 bits make
        largest = 0.0
        for block in blocks:
            for weight in block.linears.values():
                if weight.scale.max().item() * weight.grid.top > most:  # no other is worth unpacking
                    largest = max(largest, weight.dequantize().abs().max().item())
        if largest <= most:
            return None
        return DoesNotFit(
            f"a weight is {largest:.4g}, and float16 ends at {most:.4g}",
            where=f"export {self.format.name}",
            hint="--set export.dtype=bfloat16",
        )

    def tensors(self, prefix: str, weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}.weight", weight.dequantize(self.dtype)

    def stored_weight(self, weight: PackedWeight) -> Tensor | None:
        return None if self.dtype == torch.float32 else weight.dequantize(self.dtype)

    def rounded(self) -> str:
        return (
            "" if self.dtype == torch.float32 else f"each weight is rounded once to {dtype_name(self.dtype)}"
        )

    def config(self, linears: Linears) -> dict[str, Any]:
        return {}

    def described(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return {}

    def parts(self, weight: PackedWeight) -> Mapping[str, Tensor]:
        # Not by what wrote them: in float64 the product is exact, and rounded once.
        size = weight.group_size
        scale, zero = (
            each.double().repeat_interleave(size, dim=1) for each in (weight.scale, weight.zero_point)
        )
        return {"weights": ((weight.codes().double() - zero) * scale).to(self.dtype)}

    def bits_of(self, weight: PackedWeight) -> int:
        return weight.out_features * weight.in_features * 8 * self.dtype.itemsize

    def sentence(self, bits: str, dtype: str) -> str:
        return (
            f"The linear layers of the decoder blocks were trained as {bits}-bit integers and are written "
            f"out as {dtype}, like embeddings, head and norms: {self.head_sentence()}the model is the "
            "quantized one, its size is not."
        )

    def loading(self, config: Mapping[str, Any], blocks_name: str) -> str:
        return _LOADING

    def reader(self, directory: Path) -> HuggingFaceReader:
        return HuggingFaceReader(directory)


@dataclass(frozen=True)
class DenseLinear:
    """A weight ``[O, I]``, as it is stored."""

    weight_OI: Tensor

    def parts(self) -> Mapping[str, Tensor]:
        return {"weights": self.weight_OI}

    def weight(self) -> Tensor:
        return self.weight_OI.float()


class HuggingFaceReader(CheckpointReader):
    """Reads a plain checkpoint."""

    format = "hf"
    suffixes = ("weight",)

    def understand(self) -> None:
        if self.config.get("quantization_config") is not None:
            raise PreflightError(
                "its configuration describes quantized weights, and only a plain checkpoint can be read back",
                where=str(self.directory),
                hint="open an export/hf directory of a run",
            )

    def names(self) -> list[str]:
        return self.stored_names()

    def linear(self, prefix: str) -> DenseLinear:
        return DenseLinear(self.stored(f"{prefix}.weight"))

    def linear_shape(self, prefix: str) -> tuple[int, int]:
        outputs, inputs = self.stored_shape(f"{prefix}.weight")
        return outputs, inputs
