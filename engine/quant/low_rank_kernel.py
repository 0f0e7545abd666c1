"""LR-QAT's weight, and the gradients behind it, in one pass over memory each (Triton).

The plain form in :mod:`engine.quant.low_rank` makes the float32 sum ``V = L + (alpha / r) A B`` in memory and
walks over it a dozen times. Here a tile of it lives in registers: the product of the factors costs ``2 r``
operations a weight, which is nothing beside reading it.

    weight      reads L (1 byte a weight, or 2), writes W^ (2)
    gradients   reads L and dW^, writes W^ once more (the input's gradient needs it) and dV; of every group
                the sums that are the gradients of scale and zero point

A group is divided into whole tiles: each row of a tile has one scale and one zero point, and its part of the
group's sums, which torch adds up, does not depend on the order in which programs run.

They are registered as operators of torch, opaque to its compiler.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WIDTHS = 32, (64, 32, 16)
"""Of a tile: rows, and as many columns as divide a group. Shapes from 16 x 128 to 128 x 128 differ by no more
than two calls with one of them; but where a tile held two groups of 64 it took three times as long (H200)."""
WARPS = 2
NARROWEST = 16
"""Columns of factors that are multiplied, at the least."""
WIDEST_RANK = 128
"""Beyond it a tile's factors do not fit beside each other."""
PRECISION = "tf32x3"
"""The factors' product is nearly as exact as in float32: integers are what depends on it."""


def takes(kept: Tensor, rank: int, groups: int) -> bool:
    """Whether the kernels can do this: latents of a byte or two, and groups that tiles divide."""
    if kept.dtype == torch.int32 or rank > WIDEST_RANK:
        return False
    return _width(kept.shape[1] // groups) > 0


def _width(group: int) -> int:
    """Columns of a tile; 0 where none suits."""
    return next((width for width in WIDTHS if group % width == 0), 0)


@torch.library.custom_op("eqat::low_rank_weight", mutates_args=())
def weight(
    kept: Tensor,
    origin_OG: Tensor,
    a_Or: Tensor,
    b_rI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    bits: int,
    ratio: float,
    dtype: torch.dtype,
    after: Tensor | None = None,
) -> Tensor:
    """``(clamp(round(V) + z, 0, Q) - z) s``, computed in float32, rounded to ``dtype`` once, ``[O, I]``.

    ``kept`` ``[O, I]`` is bfloat16 or float16, or int8 in parts of a grid step, counted from ``origin``; zero
    points are whole, and on the grid; ``ratio`` is ``alpha / r``. ``after`` is not read: as in
    :func:`engine.quant.packed_kernels.dequantize`.
    """
    made = torch.empty(kept.shape, dtype=dtype, device=kept.device)
    _launch((kept, origin_OG, a_Or, b_rI, scale_OG, zero_OG), bits, ratio, made, None)
    return made


@weight.register_fake
def _(
    kept: Tensor,
    origin_OG: Tensor,
    a_Or: Tensor,
    b_rI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    bits: int,
    ratio: float,
    dtype: torch.dtype,
    after: Tensor | None = None,
) -> Tensor:
    return kept.new_empty(kept.shape, dtype=dtype)


@torch.library.custom_op("eqat::low_rank_gradients", mutates_args=())
def gradients(
    kept: Tensor,
    origin_OG: Tensor,
    a_Or: Tensor,
    b_rI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    bits: int,
    ratio: float,
    grad_OI: Tensor,
    zero: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight again and ``dV``, both in the type of ``grad_OI``, the weight's gradient; and over every
    group, float32 ``[1 or 2, O, G]``, the sum of ``(q - z) dW^``, and where ``zero`` asks for it that of
    ``dW^`` where the grid's ends cut."""
    outputs, inputs = kept.shape
    groups = scale_OG.shape[1]
    grad_OI = grad_OI.contiguous()
    made, moved = torch.empty_like(grad_OI), torch.empty_like(grad_OI)
    parts = inputs // _width(inputs // groups)
    sums = torch.empty(2 if zero else 1, outputs, parts, dtype=torch.float32, device=kept.device)
    latents = kept, origin_OG, a_Or, b_rI, scale_OG, zero_OG
    _launch(latents, bits, ratio, made, _Backward(grad_OI, moved, sums))
    return made, moved, sums.view(len(sums), outputs, groups, -1).sum(-1) if parts > groups else sums


@gradients.register_fake
def _(
    kept: Tensor,
    origin_OG: Tensor,
    a_Or: Tensor,
    b_rI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    bits: int,
    ratio: float,
    grad_OI: Tensor,
    zero: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = grad_OI.new_empty((2 if zero else 1, *scale_OG.shape), dtype=torch.float32)
    made = grad_OI.new_empty(grad_OI.shape)
    return made, grad_OI.new_empty(grad_OI.shape), sums


def try_out(device: torch.device) -> None:
    """Compile and run the kernels once; raises what stands in its way."""
    one, thin = torch.ones(1, 1, device=device), torch.ones(1, 16, device=device)
    kept = torch.zeros(1, 16, dtype=torch.int8, device=device)
    latents = kept, one, one, thin, one, one, 2, 1.0
    gradients(*latents, weight(*latents, torch.float32), True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Backward(NamedTuple):
    """Where the gradient lies, and where what is made of it goes."""

    grad_OI: Tensor
    moved_OI: Tensor
    sums: Tensor


def _launch(
    latents: tuple[Tensor, ...], bits: int, ratio: float, made: Tensor, backward: _Backward | None
) -> None:
    kept, _, a_Or, _, scale_OG, _ = latents
    outputs, inputs = kept.shape
    group, rank = inputs // scale_OG.shape[1], a_Or.shape[1]
    width = _width(group)
    launcher: Any = _tile[(triton.cdiv(outputs, ROWS), triton.cdiv(inputs, width))]
    launcher(
        *(*(tensor.contiguous() for tensor in latents), made),
        *(backward or (made, made, made)),
        *(outputs, inputs, rank, ratio),
        BITS=bits,
        GROUP=group,
        FIXED=kept.dtype == torch.int8,
        BACKWARD=backward is not None,
        ZERO=backward is not None and len(backward.sums) == 2,
        RANK=max(NARROWEST, triton.next_power_of_2(rank)),
        ROWS=ROWS,
        COLUMNS=width,
        PRECISION=PRECISION,
        num_warps=WARPS,
    )


@triton.jit
def _tile(
    kept_ptr, origin_ptr, a_ptr, b_ptr, scale_ptr, zero_ptr, weight_ptr, grad_ptr, moved_ptr, sums_ptr,
    outputs, inputs, rank, ratio,
    BITS: tl.constexpr, GROUP: tl.constexpr, FIXED: tl.constexpr, BACKWARD: tl.constexpr, ZERO: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TOP: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factor = tl.arange(0, RANK)
    here = (row < outputs)[:, None] & (column < inputs)[None, :]
    place = row.to(tl.int64)[:, None] * inputs + column[None, :]
    group = row[:, None] * (inputs // GROUP) + tl.program_id(1) * COLUMNS // GROUP
    grouped = (row < outputs)[:, None]

    a_at = row[:, None] * rank + factor[None, :]
    b_at = factor[:, None] * inputs + column[None, :]
    a = tl.load(a_ptr + a_at, mask=(row < outputs)[:, None] & (factor < rank)[None, :], other=0.0)
    b = tl.load(b_ptr + b_at, mask=(factor < rank)[:, None] & (column < inputs)[None, :], other=0.0)
    product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)

    steps = tl.load(kept_ptr + place, mask=here, other=0).to(tl.float32)
    if FIXED:
        origin = tl.load(origin_ptr + group, mask=grouped, other=0).to(tl.float32)
        steps = steps / (1 << (8 - BITS)) - (origin - (1 << (BITS - 1)))
    steps = steps + ratio * product
    scale = tl.load(scale_ptr + group, mask=grouped, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + group, mask=grouped, other=0.0).to(tl.float32)
    # To the nearest integer, ties to even; far outside the grid any large number will do.
    nearest = (tl.minimum(tl.maximum(steps, -1024.0), 1024.0) + 12582912.0) - 12582912.0
    unclamped = nearest + zero
    centred = tl.minimum(tl.maximum(unclamped, 0.0), TOP) - zero
    tl.store(weight_ptr + place, (centred * scale).to(weight_ptr.dtype.element_ty), mask=here)
    if BACKWARD:
        inside = (unclamped >= 0.0) & (unclamped <= TOP)
        grad = tl.load(grad_ptr + place, mask=here, other=0.0).to(tl.float32)
        moved = tl.where(inside, grad * scale, 0.0)
        tl.store(moved_ptr + place, moved.to(moved_ptr.dtype.element_ty), mask=here)
        parts = inputs // COLUMNS
        target = row.to(tl.int64) * parts + tl.program_id(1)
        tl.store(sums_ptr + target, tl.sum(centred * grad, 1), mask=row < outputs)
        if ZERO:
            cut = tl.sum(tl.where(inside, 0.0, grad), 1)
            tl.store(sums_ptr + outputs * parts + target, cut, mask=row < outputs)
