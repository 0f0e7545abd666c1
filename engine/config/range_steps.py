"""The ranges that the search with a norm tries for a group (:func:`engine.quant.grid.initial_range`), which
the plan counts."""

from __future__ import annotations

from engine.config.grid import Grid

STEPS = 15
"""Fractions of the span, in equal steps down to the lowest."""


def shrink_steps(grid: Grid) -> list[tuple[float, float]]:
    """Fractions of the lower and the upper end of the span to try, the whole span first."""
    lowest = 0.3 if grid.bits <= 3 else 0.6
    steps = [1 - (1 - lowest) * i / (STEPS - 1) for i in range(STEPS)]
    if grid.bits > 2 or grid.fixed_zero_point is not None:
        return [(part, part) for part in steps]
    # Four levels are so few that the two ends deserve separate fractions.
    coarse = steps[::2]
    return [(low, high) for low in coarse for high in coarse]


def tried_ranges(grid: Grid) -> int:
    """Ranges that are tried for a group: each with both sides where groups turn round."""
    return len(shrink_steps(grid)) * (2 if grid.turns else 1)
