"""What the weights weigh: an export in each format, the 16-bit model, bits a quantized weight.

A group of g weights of b bits costs g*b bits of codes, b of zero point and 16 of scale; everything that is
not the weight of a linear stays at 16 bits, and what is no part of the model is taken over as it is. What
else a format writes for a linear, its row of the table says (``Format.costs``).
"""

from __future__ import annotations

import msgspec

from engine.architecture.families import Architecture
from engine.config.dtypes import DTYPE_BYTES
from engine.config.formats import DEFAULT_FORMAT, FORMATS, packed_bits
from engine.config.grid import GridConfig
from engine.config.tables import load_named


def exported_bytes(arch: Architecture, grid: GridConfig, name: str, number: int = 2) -> int:
    """The tensors of an export in the format called ``name``; ``number`` bytes each number that is not
    quantized."""
    row = FORMATS[name]
    if row.sizes:
        return int(load_named(row.sizes)(arch, grid, number))
    linears = sum(
        row.linear_bytes(linear.out_features, linear.in_features, grid.shared, number)
        for linear in arch.linears
    )
    carried = arch.carried_bytes if row.carries else 0
    others = number * (arch.bias_params_per_block + arch.norm_params_per_block)
    return arch.blocks * (linears + others) + number * arch.rest_params + carried


def number_bytes(dtype: str) -> int:
    """Bytes of a number that is not quantized, by ``export.dtype``; ``auto`` is one of 16 bits."""
    return DTYPE_BYTES.get(dtype, 2)


class Sizes(msgspec.Struct, frozen=True):
    """Bytes of the tensors."""

    exports: dict[str, int]
    """Of each format."""
    fp: int
    bits_per_weight: float


def sizes(arch: Architecture, grid: GridConfig, formats: tuple[str, ...] = (), number: int = 2) -> Sizes:
    """The exports in ``formats`` (in the default one, where none is asked for) and the 16-bit model;
    ``number`` as above."""
    bits = sum(
        packed_bits(linear.out_features, linear.in_features, grid.bits, grid.group_size)
        for linear in arch.linears
    )
    return Sizes(
        exports={name: exported_bytes(arch, grid, name, number) for name in formats or (DEFAULT_FORMAT,)},
        fp=2 * arch.params,
        bits_per_weight=bits / arch.linear_params_per_block,
    )
