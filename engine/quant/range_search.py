"""Scale and zero point of each group, searched together for the least weighted error (NeUQI, arXiv
2505.17595).

    minimise  sum_i h_i ((clamp(round(w_i / s) + z, 0, Q) - z) s - w_i)^2    over s and z

``h`` is what each input channel counts. Where it is the channel's sum of squares, this is the error of the
linear's output as far as channels do not go together. The scale runs over fractions of the group's span, in
equal ratios and then in equal steps around the best of them; the zero point over integers, since the best one
for a narrower range is not the one that centres it. What a grid fixes stays fixed.

:mod:`engine.quant.range_kernel` does the same on a GPU with the groups in registers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.config.grid import Grid
from engine.config.joint_search import COARSE, FINE, GPU_VALUES, VALUES, zero_points
from engine.quant.grid import SMALLEST_SCALE, range_to_grid

LARGEST_KERNEL_GROUP = 512
HELD = 2
"""Of as many numbers as are held at once, torch's form takes half for one tensor: of three, a little more."""
SMALLEST_WEIGHT, LARGEST_WEIGHT = 0.01, 100.0
"""What a channel counts at least and at most, in terms of the mean."""


def lowest_fraction(bits: int) -> float:
    """Of the span: the fewer levels there are, the more of it may be cut off."""
    return {2: 0.05, 3: 0.15}.get(bits, 0.25)


def values_at_a_time(device: torch.device) -> int:
    """How many numbers are held at once, where memory suffices."""
    return GPU_VALUES if device.type == "cuda" else VALUES


def channel_weights(squares_I: Tensor) -> Tensor:
    """What channels count, from their sums of squares: 1 in the mean, and none alone. A sum that is not
    finite counts the most and nothing in the mean; without any that says something all count alike."""
    squares = squares_I.float()
    mean = squares[squares.isfinite()].mean()
    relative = torch.where(squares.isfinite(), squares / mean, LARGEST_WEIGHT)
    return relative.nan_to_num(1.0).clamp(SMALLEST_WEIGHT, LARGEST_WEIGHT)


@torch.no_grad()
def search_range(
    weight_OI: Tensor,
    grid: Grid,
    channels_I: Tensor | None = None,
    *,
    kernel: bool = False,
    values: int | None = None,
    poll: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, float32 ``[O, G]``; the zero point holds whole numbers.

    Without ``channels_I`` all channels count alike. ``kernel`` takes Triton's form, for groups that a program
    can hold; ``values`` numbers are held at once, some rows at a time, between which ``poll`` is called.
    """
    outputs, inputs = weight_OI.shape
    groups = grid.groups(inputs)
    kernel = kernel and inputs // groups <= LARGEST_KERNEL_GROUP
    values = values or values_at_a_time(weight_OI.device)
    if channels_I is None:
        channels_I = torch.ones(inputs, device=weight_OI.device)
    channels_Gg = channels_I.float().reshape(groups, -1)
    rows = max(1, values // (inputs * (1 if kernel else HELD)))
    factors = _factors(grid.bits, weight_OI.device)
    found = []
    for part in weight_OI.detach().split(min(rows, outputs)):
        poll()
        weight_OGg = part.float().reshape(len(part), groups, -1)
        span, first = _beginning(weight_OGg, grid)
        given = (weight_OGg, channels_Gg, span, first, zero_points(grid), grid.top, *factors)
        if kernel:
            from engine.quant import range_kernel

            found.append(range_kernel.search(*given))
        else:
            found.append(search(*given))
    scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not grid.turns:
        return scale, zero
    fixed = torch.full_like(zero, float(grid.fixed_zero_point or 0))
    return torch.where(zero == fixed, scale, -scale), fixed


def _beginning(weight_OGg: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale at which a grid just spans each group, and the first zero point to try."""
    low, high = weight_OGg.amin(-1).clamp_(max=0), weight_OGg.amax(-1).clamp_(min=0)
    scale, centre = range_to_grid(low, high, grid)
    if (fixed := grid.fixed_zero_point) is not None:
        first = min(fixed, grid.top - fixed) if grid.turns else fixed
        return scale.abs(), torch.full_like(scale, float(first))
    count = zero_points(grid)
    return scale, (centre - count // 2).clamp_(0, grid.top + 1 - count)


def _factors(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Fractions of the span, from all of it; factors of the best of them, from one neighbour to the other."""
    ratio = lowest_fraction(bits) ** (1 / (COARSE - 1))
    coarse = torch.tensor([ratio**i for i in range(COARSE)], device=device)
    return coarse, torch.linspace(ratio, 1 / ratio, FINE, device=device)


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
    """Torch's form, which tries one scale with one zero point after the other, ``count`` of them from
    ``first`` on: what it holds stays in the caches."""
    least, scale, zero = torch.full_like(span_OG, torch.inf), span_OG, first_OG
    ratio, rounded, error = (torch.empty_like(weight_OGg) for _ in range(3))
    # Bounds that are numbers are much faster than tensors of them, so levels count from the first point.
    first_OG1 = first_OG.unsqueeze(-1) if first_OG.any() else None
    for factors in (coarse, fine):
        middle = scale  # the whole span at first
        for factor in factors:
            tried = (factor * middle).clamp_(min=SMALLEST_SCALE)
            torch.div(weight_OGg, tried.unsqueeze(-1), out=ratio)
            torch.round(ratio, out=rounded)
            if first_OG1 is not None:
                rounded.add_(first_OG1)
            square = tried.square()
            for more in range(count):
                torch.clamp(rounded, -more, top - more, out=error)
                if first_OG1 is not None:
                    error.sub_(first_OG1)
                error.sub_(ratio).square_().mul_(channels_Gg)
                found = error.sum(-1).mul_(square)
                better = found < least
                least = torch.where(better, found, least)
                scale = torch.where(better, tried, scale)
                zero = torch.where(better, first_OG + more, zero)
    return scale, zero
