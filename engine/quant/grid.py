"""The grid: asymmetric, uniform, one scale and zero point for each group of a row.

    q  = clamp(round(W / s) + z, 0, Q),  Q = 2^bits - 1        the stored integer
    W^ = (q - z) * s                                           what the network computes with

``W`` is ``[O, I]`` (out features, in features); a group is ``group_size`` neighbours along ``I``, so ``s``
and ``z`` are ``[O, G]`` with ``G = I / group_size``. A zero point may be fixed: then a grid is the same with
one ``z`` everywhere, ``2^(bits-1)`` where it is symmetric.

Training sees this function through straight-through gradients: rounding passes its gradient unchanged,
clamping is exact (EfficientQAT, arXiv 2407.11062, section 3.2; LSQ+, arXiv 2004.09576). With ``inside``
marking the weights whose integer was not clamped:

    dW^/dW = inside
    dW^/ds = (q - z) - inside * W / s
    dW^/dz = -(1 - inside) * s

A weight may also be counted in grid steps, ``V = W / s`` (as LR-QAT has it, arXiv 2406.06385, equation 4), so
that it moves with its scale, and no integer changes because a scale does:

    W^ = (clamp(round(V) + z, 0, Q) - z) * s
    dW^/dV = inside * s,  dW^/ds = q - z,  dW^/dz = -(1 - inside) * s
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from engine.config.grid import Grid
from engine.config.range_steps import shrink_steps

# A scale never falls below this fraction of its group's initial one. An absolute floor (1e-4 is common) is
# larger than the right scale of small weights and would freeze them.
RELATIVE_SCALE_FLOOR = 1e-2
# Groups whose weights are all zero still need a scale that fp16 can hold.
SMALLEST_SCALE = 2.0**-20


def _grouped(weight_OI: Tensor, groups: int) -> Tensor:
    return weight_OI.reshape(weight_OI.shape[0], groups, -1)


def quantize(weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, bits: int) -> Tensor:
    """Integers ``q`` of the grid, uint8 ``[O, I]``."""
    weight_OGg = _grouped(weight_OI, scale_OG.shape[1])
    q = torch.round(weight_OGg / scale_OG.unsqueeze(-1)) + zero_point_OG.to(scale_OG.dtype).unsqueeze(-1)
    return q.clamp_(0, 2**bits - 1).to(torch.uint8).reshape(weight_OI.shape)


def dequantize(codes_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor) -> Tensor:
    """``(q - z) * s`` in the dtype of ``scale``."""
    codes_OGg = _grouped(codes_OI, scale_OG.shape[1]).to(scale_OG.dtype)
    centred = codes_OGg - zero_point_OG.to(scale_OG.dtype).unsqueeze(-1)
    return (centred * scale_OG.unsqueeze(-1)).reshape(codes_OI.shape)


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize with the gradients of the module docstring.

    Only the inputs are kept for the backward pass and the integers are computed again there: a second round
    is cheaper than carrying one more ``[O, I]`` tensor per linear through the whole block.
    """

    @staticmethod
    def forward(
        ctx: Any, weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, bits: int, in_steps: bool
    ) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_OG, zero_point_OG)
        ctx.bits, ctx.in_steps = bits, in_steps
        scale = scale_OG.unsqueeze(-1)
        zero = zero_point_OG.round().clamp_(0, 2**bits - 1).unsqueeze(-1)
        ratio = _grouped(weight_OI, scale_OG.shape[1]) / (1 if in_steps else scale)
        q = ratio.round_().add_(zero).clamp_(0, 2**bits - 1)
        return q.sub_(zero).mul_(scale).reshape(weight_OI.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, scale_OG, zero_point_OG = ctx.saved_tensors
        top = 2**ctx.bits - 1
        scale = scale_OG.unsqueeze(-1)
        rounded_zero = zero_point_OG.round()
        zero = rounded_zero.clamp(0, top).unsqueeze(-1)
        grad_OGg = _grouped(grads[0], scale_OG.shape[1])

        ratio = _grouped(weight_OI, scale_OG.shape[1]) / (1 if ctx.in_steps else scale)
        unclamped = ratio.round().add_(zero)
        inside = (unclamped >= 0) & (unclamped <= top)
        inside_grad = grad_OGg * inside
        grad_weight = grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            centred = unclamped.clamp_(0, top).sub_(zero)
            grad_scale = (grad_OGg * centred).sum(-1)
            if not ctx.in_steps:
                grad_scale = grad_scale - (inside_grad * ratio).sum(-1)
        if ctx.needs_input_grad[2]:
            # Straight through the rounding of z, exact through its clamp.
            moves = ((rounded_zero >= 0) & (rounded_zero <= top)).to(grad_OGg.dtype)
            grad_zero = -(grad_OGg.sum(-1) - inside_grad.sum(-1)) * scale_OG * moves
        if ctx.needs_input_grad[0]:
            grad_weight = (inside_grad * scale if ctx.in_steps else inside_grad).reshape(weight_OI.shape)
        return grad_weight, grad_scale, grad_zero, None, None


def fake_quantize(weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, bits: int) -> Tensor:
    """Differentiable ``dequantize(quantize(W))``, ``[O, I]``; ``z`` is rounded and clamped on the way.

    All three tensors are floating point and may require gradients.
    """
    result: Tensor = _FakeQuantize.apply(weight_OI, scale_OG, zero_point_OG, bits, False)
    return result


def fake_quantize_steps(steps_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, bits: int) -> Tensor:
    """The same of weights that are counted in grid steps."""
    result: Tensor = _FakeQuantize.apply(steps_OI, scale_OG, zero_point_OG, bits, True)
    return result


def initial_range(
    weight_OI: Tensor,
    grid: Grid,
    *,
    method: Literal["minmax", "search"] = "minmax",
    norm: float = 2.5,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, float32 ``[O, G]``; the zero point holds whole numbers.

    ``minmax`` spans the group (always including zero, so that zero stays representable). ``search`` shrinks
    that span step by step and keeps the one with the least sum of ``|W - W^|^norm``; at 2 bits one outlier
    otherwise stretches the grid until most weights round to the same integer.
    """
    weight_OGg = _grouped(weight_OI.float(), grid.groups(weight_OI.shape[1]))
    low = weight_OGg.amin(-1).clamp_(max=0)
    high = weight_OGg.amax(-1).clamp_(min=0)
    if method == "minmax":
        return range_to_grid(low, high, grid)

    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = range_to_grid(low, high, grid)
    sides = (_one_way, _turned) if grid.turns else (range_to_grid,)
    for (low_part, high_part), to_grid in product(shrink_steps(grid), sides):
        scale, zero = to_grid(low * low_part, high * high_part, grid)
        q = (weight_OGg / scale.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, grid.top)
        error = _power(
            q.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).sub_(weight_OGg).abs_(), norm
        ).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _power(error: Tensor, norm: float) -> Tensor:
    """``error ** norm`` for non-negative ``error``, in place.

    A general power costs more than all the rest of the search; half-integer ones are products and a square
    root.
    """
    whole, half = divmod(norm, 1)
    if half == 0.5 and whole == 2:
        return error.square().mul_(error.sqrt_())
    return error.square_() if norm == 2 else error.pow_(norm)


def range_to_grid(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale and zero point ``[O, G]`` with which a grid spans each group, from ``low`` (at most 0) to
    ``high`` (at least 0); where groups turn round, the shorter of the two scales."""
    if grid.turns:
        (ahead, zero), (back, _) = _one_way(low, high, grid), _turned(low, high, grid)
        return torch.where(-back < ahead, back, ahead), zero
    if grid.fixed_zero_point is not None:
        return _one_way(low, high, grid)
    scale = ((high - low) / grid.top).clamp_(min=SMALLEST_SCALE)
    zero = torch.round(-low / scale).clamp_(0, grid.top)
    return scale, zero


def _one_way(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """About a fixed zero point: the two sides have different numbers of steps, and the one that needs the
    longer ones decides."""
    fixed = grid.fixed_zero_point
    assert fixed is not None
    scale = torch.maximum(-low / fixed, high / (grid.top - fixed)).clamp_(min=SMALLEST_SCALE)
    return scale, torch.full_like(scale, float(fixed))


def _turned(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The same with a scale below zero, for which the two sides change places."""
    scale, zero = _one_way(-high, -low, grid)
    return -scale, zero
