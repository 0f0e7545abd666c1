"""Quantized weights on their way from the rank that trains them to all others: integers, zero points and
scales in one message, and back (Triton).

A rank that has taken the step of its part of a weight owes the others the new ``W^ = (q - z) s`` of it
(:mod:`engine.training.sharded`). ``q`` has as many bits as the grid, and ``s`` and ``z`` are one number a
group, so at 2 bits in groups of 64 that is 0.33 bytes a weight where ``W^`` itself has 2 and ``W`` has 4.
What comes out is what the rank has itself, bit for bit: ``q`` and ``z`` are small integers, ``s`` travels as
float32.

Layout of a rank's section: one number that goes along (float32); then for each linear one after the other of
every group its values' integers, then all zero points (a byte each), then all scales (float32). Each is
padded to 16 bytes. A byte holds the integers of
4, 2 or 1 values (2, up to 4, up to 8 bits), which lie a quarter or half a group apart: then both kernels read
and write whole stretches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.quant.quant_step import _levels, _round

ALIGNMENT = 16
HELD_BYTES = 256
"""Of integers that a program holds at a time."""


@dataclass(frozen=True)
class Part:
    """What a rank has of a linear: ``weight`` flat, ``scale`` and ``zero_point`` of its groups, float32; and
    the linear's whole ``quantized`` weight, which a message fills, of all ranks."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    quantized: Tensor
    bits: int
    in_steps: bool

    @property
    def groups(self) -> int:
        return self.scale.numel()

    @property
    def group_size(self) -> int:
        return self.weight.numel() // self.groups

    @property
    def together(self) -> int:
        """Values of a byte."""
        together = 4 if self.bits <= 2 else 2 if self.bits <= 4 else 1
        return together if self.group_size % together == 0 else 1


class Message:
    """The parts of all ranks: ``[ranks, section]`` bytes on the parts' device."""

    def __init__(self, parts: Sequence[Part], rank: int, ranks: int) -> None:
        self._parts, self._rank = list(parts), rank
        self._places: list[tuple[int, int, int]] = []
        end = ALIGNMENT
        for part in parts:
            begins = []
            for length in (part.weight.numel() // part.together, part.groups, 4 * part.groups):
                begins.append(end)
                end += -(-length // ALIGNMENT) * ALIGNMENT
            self._places.append((begins[0], begins[1], begins[2]))
        self.bytes = torch.zeros(ranks, end, dtype=torch.uint8, device=parts[0].weight.device)
        self.noted = self.bytes[:, :4].view(torch.float32)[:, 0]
        """The number that goes along with each section."""
        self.note = self.noted[rank]
        """The one that goes along with this rank's; to be filled in."""

    def write(self) -> None:
        """This rank's section, of its parts as they are."""
        own, section = self.bytes[self._rank], self.bytes.shape[1]
        for part, (integers, zeros, scales) in zip(self._parts, self._places, strict=True):
            rows, columns = _held(part)
            launcher: Any = _pack[(triton.cdiv(part.groups, rows),)]
            launcher(
                *(part.weight, part.scale, part.zero_point),
                *(own[integers:], own[zeros:], own[scales:section].view(torch.float32), part.groups),
                GROUP=part.group_size,
                TOP=2**part.bits - 1,
                TOGETHER=part.together,
                IN_STEPS=part.in_steps,
                ROWS=rows,
                COLUMNS=columns,
            )

    def read(self) -> None:
        """The quantized weights of all ranks, of all sections."""
        ranks, section = self.bytes.shape
        flat = self.bytes.view(-1)
        for part, (integers, zeros, scales) in zip(self._parts, self._places, strict=True):
            rows, columns = _held(part)
            launcher: Any = _unpack[(triton.cdiv(ranks * part.groups, rows),)]
            launcher(
                *(flat[integers:], flat[zeros:], flat[scales:].view(torch.float32), part.quantized),
                *(part.groups, ranks * part.groups, section),
                GROUP=part.group_size,
                TOGETHER=part.together,
                ROWS=rows,
                COLUMNS=columns,
            )


def _held(part: Part) -> tuple[int, int]:
    """Groups of a program, and how many bytes of each it holds at a time."""
    columns = min(triton.next_power_of_2(part.group_size // part.together), HELD_BYTES)
    return max(1, HELD_BYTES // columns), columns


@triton.jit
def _pack(
    w_ptr, s_ptr, z_ptr, integers_ptr, zeros_ptr, scales_ptr, groups,
    GROUP: tl.constexpr, TOP: tl.constexpr, TOGETHER: tl.constexpr, IN_STEPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    present = first + row < groups
    BYTES: tl.constexpr = GROUP // TOGETHER
    BITS: tl.constexpr = 8 // TOGETHER
    scale = tl.load(s_ptr + first + row, mask=present, other=1.0)
    zero = tl.load(z_ptr + first + row, mask=present, other=0.0)
    zero = tl.minimum(tl.maximum(_round(zero), 0.0), TOP)
    tl.store(scales_ptr + first + row, scale, mask=present)
    tl.store(zeros_ptr + first + row, zero.to(tl.uint8), mask=present)
    for start in range(0, BYTES, COLUMNS):
        here = present[:, None] & (start + column < BYTES)[None, :]
        byte = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
        for place in tl.static_range(TOGETHER):
            at = row[:, None] * GROUP + place * BYTES + start + column[None, :]
            weight = tl.load(w_ptr + first * GROUP + at, mask=here, other=0.0)
            level, _ratio = _levels(weight, scale[:, None], zero[:, None], IN_STEPS)
            level = tl.minimum(tl.maximum(level, 0.0), TOP).to(tl.int32)
            byte += level << (place * BITS)
        at = row[:, None] * BYTES + start + column[None, :]
        tl.store(integers_ptr + first * BYTES + at, byte.to(tl.uint8), mask=here)


@triton.jit
def _unpack(
    integers_ptr, zeros_ptr, scales_ptr, out_ptr, groups, all_groups, section,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    present = group < all_groups
    rank, own = group // groups, group % groups
    BYTES: tl.constexpr = GROUP // TOGETHER
    BITS: tl.constexpr = 8 // TOGETHER
    scale = tl.load(scales_ptr + rank * (section // 4) + own, mask=present, other=1.0)
    zero = tl.load(zeros_ptr + rank * section + own, mask=present, other=0).to(tl.float32)
    for start in range(0, BYTES, COLUMNS):
        here = present[:, None] & (start + column < BYTES)[None, :]
        at = (rank * section + own * BYTES)[:, None] + start + column[None, :]
        byte = tl.load(integers_ptr + at, mask=here, other=0).to(tl.int32)
        for place in tl.static_range(TOGETHER):
            level = ((byte >> (place * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
            value = (level - zero[:, None]) * scale[:, None]
            to = (group * GROUP)[:, None] + place * BYTES + start + column[None, :]
            tl.store(out_ptr + to, value.to(out_ptr.dtype.element_ty), mask=here)
