"""The search of :mod:`engine.quant.range_search` with every group held in registers (Triton): a weight is
read once, and some hundred scales and zero points are tried on it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.quant.grid import SMALLEST_SCALE

HELD_VALUES = 1024
"""Weights that a program holds."""


def search(
    weight_OGg: Tensor,
    channels_Gg: Tensor,
    span_OG: Tensor,
    first_OG: Tensor,
    count: int,
    top: int,
    coarse: Tensor,
    fine: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[O, G]``, as torch's form finds them but for the order of what is equal."""
    groups, size = span_OG.numel(), weight_OGg.shape[-1]
    columns = triton.next_power_of_2(size)
    rows = max(1, HELD_VALUES // columns)
    scale, zero = torch.empty_like(span_OG), torch.empty_like(span_OG)
    launcher: Any = _search_groups[(triton.cdiv(groups, rows),)]
    launcher(
        *(weight_OGg.contiguous(), channels_Gg.contiguous(), span_OG, first_OG, coarse, fine, scale, zero),
        *(groups, len(channels_Gg)),
        GROUP=size,
        TOP=top,
        COUNT=count,
        COARSE=len(coarse),
        FINE=len(fine),
        SMALLEST=SMALLEST_SCALE,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
    )
    return scale, zero


def try_out(device: torch.device) -> None:
    """Compile and run the kernel once; raises what stands in its way."""
    one = torch.ones(1, 1, device=device)
    search(one.expand(1, 1, 32), one.expand(1, 32), one, one, 1, 3, one[0], one[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@triton.jit
def _try(
    weight, channels, scale, first, best, best_scale, best_zero, TOP: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """One scale a group with every zero point; the best of them and of what was tried before."""
    ratio = weight / scale[:, None]
    # To the nearest integer; far outside the grid any large number will do.
    nearest = (tl.minimum(tl.maximum(ratio, -1024.0), 1024.0) + 12582912.0) - 12582912.0
    unit = scale * scale
    for step in range(COUNT):
        zero = first + step
        level = tl.minimum(tl.maximum(nearest, 0.0 - zero[:, None]), TOP - zero[:, None])
        error = level - ratio
        total = tl.sum(error * error * channels, axis=1) * unit
        better = total < best
        best = tl.where(better, total, best)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    return best, best_scale, best_zero


@triton.jit
def _search_groups(
    w_ptr, channels_ptr, span_ptr, first_ptr, coarse_ptr, fine_ptr, scale_ptr, zero_ptr,
    groups, groups_in_row,
    GROUP: tl.constexpr, TOP: tl.constexpr, COUNT: tl.constexpr,
    COARSE: tl.constexpr, FINE: tl.constexpr, SMALLEST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    present = begin + row < groups
    here = present[:, None] & (column < GROUP)[None, :]
    weight = tl.load(w_ptr + begin * GROUP + row[:, None] * GROUP + column[None, :], mask=here, other=0.0)
    place = (begin + row) % groups_in_row
    channels = tl.load(channels_ptr + place[:, None] * GROUP + column[None, :], mask=here, other=0.0)
    span = tl.load(span_ptr + begin + row, mask=present, other=1.0)
    first = tl.load(first_ptr + begin + row, mask=present, other=0.0)
    best = tl.full((ROWS,), float("inf"), tl.float32)
    scale = span
    zero = first
    for index in range(COARSE):
        tried = tl.maximum(span * tl.load(coarse_ptr + index), SMALLEST)
        best, scale, zero = _try(weight, channels, tried, first, best, scale, zero, TOP, COUNT)
    middle = scale
    for index in range(FINE):
        tried = tl.maximum(middle * tl.load(fine_ptr + index), SMALLEST)
        best, scale, zero = _try(weight, channels, tried, first, best, scale, zero, TOP, COUNT)
    tl.store(scale_ptr + begin + row, scale, mask=present)
    tl.store(zero_ptr + begin + row, zero, mask=present)
