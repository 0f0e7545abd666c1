"""MLX, affine: what Apple's machines load with mlx-lm.

One quantized linear::

    weight  uint32 [O, I*b/32]   integers q, a little-endian bit stream along each row
    scales  f32    [O, G]        s
    biases  f32    [O, G]        -z * s
    bias           [O]           if the layer has one

    w[o, i] = q[o, i] * scales[o, g] + biases[o, g],   g = i // group_size

In a stream, element ``j`` occupies bits ``[b*j, b*j + b)`` and word ``k`` holds bits ``[32k, 32k + 32)``:
our own packed words. Scales and biases are float32: the product of a float16 scale and a zero point needs
more digits than 16 bits have, and every weight would be off by what its bias is rounded by. In float32
nothing is rounded, neither here nor where mlx adds the two up; a group takes 64 bits beside its integers.

mlx-lm reads a file strictly: a tensor that its model does not know ends the loading. So what a checkpoint
holds besides the model stays behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.errors import PreflightError
from engine.export.layout import Layout, Linears, group_sizes, require_one_grid
from engine.export.reader import CheckpointReader, damaged, number_of_bits
from engine.export.unpacking import unpack_rows
from engine.models.carried import CarriedTensor
from engine.quant.packed import PackedWeight

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

_LOADING = """## Loading

MLX, affine, {bits} bits, with scales and biases in float32, which hold what was trained without rounding.
With mlx-lm (`pip install mlx-lm`; on Linux `pip install "mlx[cpu]" mlx-lm`):

```python
from mlx_lm import load

model, tokenizer = load("path/to/this/directory")
```
"""


class MLX(Layout):
    """How ``mlx`` keeps quantized linears: one grid for the whole model."""

    tags = ("mlx",)
    library = "mlx"
    container = "mlx"

    def carried(self, lm: CausalLM) -> list[CarriedTensor]:
        return []

    def tensors(self, prefix: str, weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}.weight", weight.words.view(torch.uint32)
        yield f"{prefix}.scales", weight.scale.float()
        yield f"{prefix}.biases", _biases(weight)

    def config(self, linears: Linears) -> dict[str, Any]:
        grid = require_one_grid(linears, self.format.name)
        return {"group_size": group_sizes(linears)[0], "bits": grid.bits, "mode": "affine"}

    def described(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        # What has a grid of its own is named beside the one of all others.
        own = {
            name: {"group_size": linear.group_size, "bits": linear.grid.bits, "mode": "affine"}
            for name, linear in self.heads.items()
        }
        return {"quantization": {**config, **own}, "quantization_config": {**config, **own}}

    def parts(self, weight: PackedWeight) -> Mapping[str, Tensor]:
        return {"integers": weight.codes(), "scales": weight.scale.float(), "biases": _biases(weight)}

    def bits_of(self, weight: PackedWeight) -> int:
        return weight.words.numel() * 32 + weight.scale.numel() * 64

    def loading(self, config: Mapping[str, Any], blocks_name: str) -> str:
        return _LOADING.format(bits=config["bits"])

    def reader(self, directory: Path) -> MLXReader:
        return MLXReader(directory)


def _biases(weight: PackedWeight) -> Tensor:
    """``-z * s``, and +0 where ``z`` is 0."""
    return 0.0 - weight.zero_point.float() * weight.scale.float()


@dataclass(frozen=True)
class AffineLinear:
    """Codes uint8 ``[O, I]``, scales and biases float32 ``[O, G]``."""

    codes_OI: Tensor
    scale_OG: Tensor
    bias_OG: Tensor

    def parts(self) -> Mapping[str, Tensor]:
        return {"integers": self.codes_OI, "scales": self.scale_OG, "biases": self.bias_OG}

    def weight(self) -> Tensor:
        size = self.codes_OI.shape[1] // self.scale_OG.shape[1]
        scale, bias = (each.float().repeat_interleave(size, dim=1) for each in (self.scale_OG, self.bias_OG))
        return self.codes_OI.float() * scale + bias


class MLXReader(CheckpointReader):
    """Reads a quantized linear, written from the description above alone."""

    format = "mlx"
    bits: int
    suffixes = ("scales", "biases", "weight")

    def understand(self) -> None:
        said = self.config.get("quantization")
        if not isinstance(said, dict) or said.get("mode") != "affine":
            raise PreflightError(
                "its configuration has no affine quantization, and only such can be read back",
                where=str(self.directory),
                hint="open an export/mlx directory of a run",
            )
        self.bits = number_of_bits(self.directory, said.get("bits"))
        self._own_bits = {
            name: number_of_bits(self.directory, own.get("bits"))
            for name, own in said.items()
            if isinstance(own, dict)
        }

    def names(self) -> list[str]:
        beside = {f"{name}{end}" for name in self._quantized() for end in (".scales", ".biases")}
        return [name for name in self.stored_names() if name not in beside]

    def shape(self, name: str) -> tuple[int, ...]:
        prefix = name.removesuffix(".weight")
        return self.linear_shape(prefix) if prefix in self._quantized() else self.stored_shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name.removesuffix(".weight") in self._quantized() else super().dtype(name)

    def load(self, name: str) -> Tensor:
        prefix = name.removesuffix(".weight")
        return self.linear(prefix).weight() if prefix in self._quantized() else self.stored(name)

    def linear(self, prefix: str) -> AffineLinear:
        words = self.stored(f"{prefix}.weight").view(torch.int32)
        codes = torch.from_numpy(unpack_rows(words.numpy(), self.bits_of(prefix)))
        scale, bias = self.stored(f"{prefix}.scales"), self.stored(f"{prefix}.biases")
        if scale.ndim != 2 or scale.shape != bias.shape or codes.shape[1] % max(1, scale.shape[1]):
            raise damaged(self.directory, f"the tensors of {prefix} do not fit together")
        return AffineLinear(codes, scale, bias)

    def linear_shape(self, prefix: str) -> tuple[int, int]:
        outputs, words = self.stored_shape(f"{prefix}.weight")
        return outputs, words * 32 // self.bits_of(prefix)

    def bits_of(self, prefix: str) -> int:
        return self._own_bits.get(prefix, self.bits)

    def _quantized(self) -> set[str]:
        """Linears by name: those that have scales."""
        return {name.removesuffix(".scales") for name in self._entries if name.endswith(".scales")}
