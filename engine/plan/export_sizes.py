"""What the weights weigh: an export in each format, the 16-bit model, bits a quantized weight.

A group of g weights of b bits costs g*b bits of codes, b of zero point and 16 of scale, also of an embedding
and a head where they are quantized; everything else stays at 16 bits, and what is no part of the model is
taken over as it is. What else a format writes for a linear, its row of the table says (``Format.costs``).
"""

from __future__ import annotations

import msgspec

from engine.architecture.families import Architecture
from engine.config.dtypes import DTYPE_BYTES
from engine.config.formats import DEFAULT_FORMAT, FORMATS, packed_bits
from engine.config.grid import GridConfig
from engine.config.tables import load_named
from engine.plan.estimate import size_text


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
    rest = number * arch.rest_params
    if grid.head is not None:
        rest -= number * arch.head_weights
        rest += sum(row.linear_bytes(rows, width, grid.head, number) for rows, width in arch.head_matrices)
    others = number * (arch.bias_params_per_block + arch.norm_params_per_block)
    return arch.blocks * (linears + others) + rest + carried


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
    bits, weights = arch.blocks * bits, arch.blocks * arch.linear_params_per_block
    if grid.head is not None:
        bits += sum(head_bits(arch, grid))
        weights += arch.head_weights
    return Sizes(
        exports={name: exported_bytes(arch, grid, name, number) for name in formats or (DEFAULT_FORMAT,)},
        fp=2 * arch.params,
        bits_per_weight=bits / weights,
    )


def head_words(arch: Architecture, grid: GridConfig) -> str:
    """How embedding and head are quantized, and what that saves; empty where they stay numbers."""
    if grid.head is None:
        return ""
    size = grid.head.group_size
    groups = "one group a row" if size == -1 else f"groups of {size}"
    before, after = 2 * arch.head_weights, sum(head_bits(arch, grid)) // 8
    what = "the embedding, which is the head too," if arch.tied else "embedding and head"
    return (
        f"{what} at {grid.head.bits} bits, {groups}: {size_text(before)} → {size_text(after)}; "
        "rounded to nearest, not trained"
    )


def head_bits(arch: Architecture, grid: GridConfig) -> list[int]:
    """Bits of the quantized embedding, and of a head of its own, packed without a gap; none where they stay
    numbers."""
    if grid.head is None:
        return []
    return [
        packed_bits(rows, width, grid.head.bits, grid.head.group_size) for rows, width in arch.head_matrices
    ]
