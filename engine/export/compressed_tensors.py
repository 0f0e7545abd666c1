"""compressed-tensors, ``pack-quantized``: what vLLM reads asymmetric groups of 2, 3, 4 and 8 bits from.

One quantized linear::

    weight_packed      int32 [O, ceil(I*b/32)]   integers q, a little-endian bit stream along each row
    weight_scale       f16   [O, G]
    weight_zero_point  int32 [ceil(O*b/32), G]   zero points z, a stream down each column; not if symmetric
    weight_shape       int64 [2]                 O and I
    bias               [O]                       if the layer has one

    w[o, i] = (q[o, i] - z[o, g]) * weight_scale[o, g],   g = i // group_size

In a stream, element ``j`` occupies bits ``[b*j, b*j + b)`` and word ``k`` holds bits ``[32k, 32k + 32)``;
where a stream ends inside a word, the rest of it is zero. The library counts its integers from ``-2^(b-1)``
and adds that again before it packs them, so what lies in a file is ``q`` and ``z`` as they are. A symmetric
grid has ``z = 2^(b-1)``, which is not stored. Our own packed words run along the input with the same stream,
so they are ``weight_packed``.

Releases before 0.18 pack ten values a word at 3 bits, under the same name: the configuration's ``version``
tells the two apart, and so do ``weight_shape``, which says how many values there are, and the words.

Left out: activation order, and configurations of several groups of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.config.formats import Format
from engine.errors import PreflightError
from engine.export.layout import Layout, Linears, finite_scale, group_sizes, require_one_grid
from engine.export.reader import CheckpointReader, PlainLinear, damaged, number_of_bits, regular_groups
from engine.export.unpacking import unpack_values
from engine.quant.packed import PackedWeight
from engine.quant.packing import bitpack

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

LIBRARY = "0.20.0"
"""The release of compressed-tensors whose layout this is, as it writes it into what it saves."""

_LOADING = """## Loading

compressed-tensors, `pack-quantized`, {bits}-bit integers packed without a gap. With transformers and
compressed-tensors {library} or newer, which unpack the weights when they load them:

```python
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

model = AutoModelForCausalLM.from_pretrained(
    "path/to/this/directory", quantization_config=CompressedTensorsConfig(dequantize=True)
)
```

With vLLM, {servers}:

```python
from vllm import LLM

model = LLM("path/to/this/directory")
```
"""


class CompressedTensors(Layout):
    """How ``compressed-tensors`` keeps quantized linears: one group of layers, one grid."""

    tags = ("compressed-tensors",)

    def __init__(self, row: Format, ignored: tuple[str, ...] = ("lm_head",)) -> None:
        """``ignored`` are the linears of the model that are not quantized."""
        super().__init__(row)
        self.ignored = ignored

    def of(self, lm: CausalLM, dtype: torch.dtype) -> Self:
        blocks = lm.block_prefix(0).rpartition(".")[0] + "."
        outside = {
            lm.names.exported_linear(name)
            for name, module in lm.model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(blocks)
        }
        return type(self)(self.format, tuple(sorted(outside)))

    def tensors(self, prefix: str, weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}.weight_packed", weight.words
        yield f"{prefix}.weight_scale", finite_scale(prefix, weight)
        if not weight.grid.symmetric:
            # Zeros after the last row, so that their bits fill whole words.
            rows = functional.pad(weight.zero_point, (0, 0, 0, -weight.out_features % 32))
            words = -(-weight.out_features * weight.bits // 32)
            yield f"{prefix}.weight_zero_point", bitpack(rows, weight.bits, dim=0)[:words].contiguous()
        yield f"{prefix}.weight_shape", torch.tensor([weight.out_features, weight.in_features])

    def config(self, linears: Linears) -> dict[str, Any]:
        grid = require_one_grid(linears, self.format.name)
        size = group_sizes(linears)[0]
        one_a_row = size == -1 or all(linear.in_features == size for linear in linears.values())
        weights = {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.symmetric,
            "strategy": "channel" if one_a_row else "group",
            "group_size": None if one_a_row else size,
            "dynamic": False,
            "observer": "minmax",
            "actorder": None,
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "version": LIBRARY,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(self.ignored),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def bits_of(self, weight: PackedWeight) -> int:
        return super().bits_of(weight) - weight.grid.symmetric * weight.scale.numel() * weight.bits

    def loading(self, config: Mapping[str, Any], blocks_name: str) -> str:
        bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
        servers = "on GPUs (a release as is said below)" if bits < 4 else "on CPUs and GPUs"
        return _LOADING.format(bits=bits, library="0.18" if bits == 3 else "0.15", servers=servers)

    def reader(self, directory: Path) -> CompressedTensorsReader:
        return CompressedTensorsReader(directory)


class CompressedTensorsReader(CheckpointReader):
    """Reads a quantized linear, written from the description above alone."""

    format = "compressed-tensors"
    bits: int
    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def understand(self) -> None:
        said = (self.quantization.get("quant_method"), self.quantization.get("format"))
        if said != ("compressed-tensors", "pack-quantized"):
            words = " ".join(str(word)[:40] for word in said if word) or "not stated"
            raise PreflightError(
                f"its quantization is {words}, and only pack-quantized files of compressed-tensors can be "
                "read back",
                where=str(self.directory),
                hint="open an export/compressed-tensors directory of a run",
            )
        groups = self.quantization.get("config_groups")
        named = list(groups.values()) if isinstance(groups, dict) else []
        try:
            weights = named[0]["weights"]
            bits, self.symmetric = weights["num_bits"], bool(weights["symmetric"])
        except (KeyError, TypeError, IndexError) as error:
            raise damaged(self.directory / "config.json", "it describes no group of layers") from error
        if any(each.get("weights") != weights for each in named if isinstance(each, dict)):
            raise PreflightError(
                f"it describes {len(named)} groups of layers, each on its own grid, and only one can be read",
                where=str(self.directory / "config.json"),
            )
        self.bits = number_of_bits(self.directory, bits)

    def linear(self, prefix: str) -> PlainLinear:
        outputs, inputs = self.linear_shape(prefix)
        words = self.stored(f"{prefix}.weight_packed")
        scale = self.stored(f"{prefix}.weight_scale")
        groups = scale.shape[1] if scale.ndim == 2 else 0
        if words.shape[:1] != (outputs,) or not groups or inputs % groups:
            raise damaged(self.directory, f"the tensors of {prefix} do not fit its weight_shape")
        codes = unpack_values(words.numpy(), self.bits, inputs)
        if self.symmetric:
            zeros = torch.full(tuple(scale.shape), 1 << (self.bits - 1), dtype=torch.uint8)
        else:
            columns = self.stored(f"{prefix}.weight_zero_point").numpy().T
            zeros = torch.from_numpy(unpack_values(columns, self.bits, outputs)).t().contiguous()
        return PlainLinear(
            codes_OI=torch.from_numpy(codes).contiguous(),
            zero_OG=zeros,
            scale_OG=scale,
            group_of_I=self._groups(prefix, inputs, groups),
        )

    def _groups(self, prefix: str, inputs: int, groups: int) -> Tensor:
        """The group of each input; in activation order the file lists them."""
        listed = f"{prefix}.weight_g_idx"
        return self.stored(listed) if listed in self else regular_groups(inputs, groups)

    def linear_shape(self, prefix: str) -> tuple[int, int]:
        shape = self.stored(f"{prefix}.weight_shape").flatten().tolist()
        if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise damaged(self.directory, f"{prefix}.weight_shape is {str(shape)[:40]}")
        return shape[0], shape[1]
