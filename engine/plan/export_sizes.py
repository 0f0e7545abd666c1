"""What the weights weigh: an export in each format, the 16-bit model, bits a quantized weight.

A group of g weights of b bits costs g*b bits of codes, b of zero point and 16 of scale; everything that is
not the weight of a linear stays at 16 bits. What else a format writes for a linear, its row of the table
says (``Format.costs``).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from engine.architecture.families import Architecture
from engine.config.formats import FORMATS
from engine.config.grid import GridConfig
from engine.config.tables import load_named

LinearBytes = Callable[[int, int, int, int], int]
"""Bytes of one linear of so many outputs, inputs, bits and group size."""


def packed_bytes(out_features: int, in_features: int, bits: int, group_size: int) -> int:
    """Codes, zero points and scales of a linear, packed without a gap."""
    return _packed_bits(out_features, in_features, bits, group_size) // 8


def gptq_bytes(out_features: int, in_features: int, bits: int, group_size: int) -> int:
    """The same, and each input's group (int32), which GPTQ files list."""
    return packed_bytes(out_features, in_features, bits, group_size) + 4 * in_features


def _packed_bits(out_features: int, in_features: int, bits: int, group_size: int) -> int:
    groups = out_features * (1 if group_size == -1 else in_features // group_size)
    return out_features * in_features * bits + groups * (bits + 16)


def format_bytes(arch: Architecture, grid: GridConfig, name: str) -> int:
    """The tensors of an export in the format called ``name``; packed without a gap where its row gives no
    function."""
    linear_bytes: LinearBytes = load_named(FORMATS[name].costs) if FORMATS[name].costs else packed_bytes
    linears = sum(
        linear_bytes(linear.out_features, linear.in_features, grid.bits, grid.group_size)
        for linear in arch.linears
    )
    others = 2 * (arch.bias_params_per_block + arch.norm_params_per_block)
    return arch.blocks * (linears + others) + 2 * arch.rest_params


class Sizes(msgspec.Struct, frozen=True):
    """Bytes of the tensors."""

    export: int
    fp: int
    bits_per_weight: float


def sizes(arch: Architecture, grid: GridConfig, formats: tuple[str, ...] = ()) -> Sizes:
    """The exports in ``formats`` (in the first of all, where none is asked for) and the 16-bit model."""
    packed_bits = sum(
        _packed_bits(linear.out_features, linear.in_features, grid.bits, grid.group_size)
        for linear in arch.linears
    )
    return Sizes(
        export=sum(format_bytes(arch, grid, name) for name in formats or FORMATS.names()[:1]),
        fp=2 * arch.params,
        bits_per_weight=packed_bits / arch.linear_params_per_block,
    )
