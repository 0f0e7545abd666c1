"""Scale and zero point of each group, searched together for the least weighted error.

    minimise  sum_i h_i |(clamp(round(w_i / s) + z, 0, Q) - z) s - w_i|^p    over s and z

``h`` is what each input channel counts: where it is the channel's sum of squares, the error with ``p = 2`` is
that of the linear's output as far as channels do not go together (NeUQI, arXiv 2505.17595). The scale runs
over fractions of the group's span, in equal ratios and then in equal steps around the best of them; the zero
point over every integer, since the best one for a narrower range is not the one that centres it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config.grid import Grid
from engine.quant.grid import SMALLEST_SCALE

COARSE, FINE = 64, 32
"""Scales that are tried for each zero point: over the whole range, and around the best of them."""
VALUES_AT_A_TIME = 1 << 25
"""Errors that are held at once by the plain form."""
LARGEST_KERNEL_GROUP = 512
SMALLEST_WEIGHT, LARGEST_WEIGHT = 0.01, 100.0
"""What a channel counts at least and at most, in terms of the mean."""


def lowest_fraction(bits: int) -> float:
    """Of the span: the fewer levels there are, the more of it may be cut off."""
    return {2: 0.05, 3: 0.15}.get(bits, 0.25)


def channel_weights(squares_I: Tensor) -> Tensor:
    """What channels count, from their sums of squares: 1 in the mean, and none alone."""
    relative = squares_I.float() / squares_I.float().mean()
    return relative.nan_to_num(1.0).clamp(SMALLEST_WEIGHT, LARGEST_WEIGHT)


@torch.no_grad()
def search_range(
    weight_OI: Tensor,
    grid: Grid,
    channels_I: Tensor | None = None,
    *,
    power: float = 2.0,
    joint: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, float32 ``[O, G]``; without ``channels_I`` all channels count
    alike.

    Not ``joint``, the zero point stays that of the whole span, and the range only shrinks towards it.
    """
    weight_OGg = weight_OI.detach().float().reshape(len(weight_OI), grid.groups(weight_OI.shape[1]), -1)
    low, high = weight_OGg.amin(-1).clamp_(max=0), weight_OGg.amax(-1).clamp_(min=0)
    if (fixed := grid.fixed_zero_point) is not None:
        span = torch.maximum(-low / fixed, high / (grid.top - fixed)).clamp_(min=SMALLEST_SCALE)
        first, count = torch.full_like(span, float(fixed)), 1
    else:
        span = ((high - low) / grid.top).clamp_(min=SMALLEST_SCALE)
        first, count = torch.round(-low / span).clamp_(0, grid.top), 1
        if joint:
            first, count = torch.zeros_like(span), grid.top + 1
    if channels_I is None:
        channels_I = torch.ones(weight_OI.shape[1], device=weight_OI.device)
    channels_Gg = channels_I.to(span).reshape(weight_OGg.shape[1:])
    coarse, fine = _steps(lowest_fraction(grid.bits), span.device)
    arguments = (weight_OGg, channels_Gg, span, first, count, grid.top, power, coarse, fine)
    if weight_OI.is_cuda and weight_OGg.shape[-1] <= LARGEST_KERNEL_GROUP:
        from engine.quant.range_kernel import search

        scale, zero = search(*arguments)
    else:
        scale, zero = _search(*arguments)
    return scale.clamp_(min=SMALLEST_SCALE), zero


def _steps(lowest: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Fractions of the span, from all of it; factors of the best of them, from one neighbour to the other."""
    ratio = lowest ** (1 / (COARSE - 1))
    coarse = torch.tensor([ratio**i for i in range(COARSE)], device=device)
    return coarse, torch.linspace(ratio, 1 / ratio, FINE, device=device)


def _search(
    weight_OGg: Tensor,
    channels_Gg: Tensor,
    span_OG: Tensor,
    first_OG: Tensor,
    count: int,
    top: int,
    power: float,
    coarse: Tensor,
    fine: Tensor,
) -> tuple[Tensor, Tensor]:
    """The plain form, some rows at a time; ``count`` zero points from ``first`` on are tried."""
    zeros = torch.arange(count, device=span_OG.device)
    columns = weight_OGg[0].numel()
    scales = max(1, min(COARSE, VALUES_AT_A_TIME // (count * columns)))
    rows = max(1, VALUES_AT_A_TIME // (count * scales * columns))
    found = []
    parts = (tensor.split(rows) for tensor in (weight_OGg, span_OG, first_OG))
    for weight, span, first in zip(*parts, strict=True):
        best = torch.full_like(span, torch.inf), span, first
        for factors in (coarse, fine):
            of = best[1] if factors is fine else span
            for some in factors.split(scales):
                tried = some[:, None, None] * of
                best = _better(best, weight, channels_Gg, tried, first, zeros, top, power)
        found.append(best[1:])
    scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scale, zero


def _better(
    best: tuple[Tensor, Tensor, Tensor],
    weight_OGg: Tensor,
    channels_Gg: Tensor,
    scale_SOG: Tensor,
    first_OG: Tensor,
    zeros_Z: Tensor,
    top: int,
    power: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Error, scale and zero point of each group after these were tried."""
    ratio = weight_OGg / scale_SOG.unsqueeze(-1)
    zero_ZOG = first_OG + zeros_Z[:, None, None]
    below = -zero_ZOG[:, None, ..., None]  # [Z, 1, O, G, 1]
    error = torch.maximum(torch.minimum(ratio.round(), below + top), below).sub_(ratio)
    error = error.square_() if power == 2 else error.abs_().pow_(power)
    error_ZSOG = error.mul_(channels_Gg).sum(-1).mul_(scale_SOG**power)
    least, place = error_ZSOG.flatten(0, 1).min(0)
    scale = scale_SOG.gather(0, (place % len(scale_SOG)).unsqueeze(0))[0]
    zero = zero_ZOG.gather(0, (place // len(scale_SOG)).unsqueeze(0))[0]
    better = least < best[0]
    return (
        torch.where(better, least, best[0]),
        torch.where(better, scale, best[1]),
        torch.where(better, zero, best[2]),
    )
