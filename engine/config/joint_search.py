"""How much the joint search of scale and zero point tries and holds (:mod:`engine.quant.range_search`), which
the plan counts."""

from __future__ import annotations

from engine.config.grid import Grid

SEQUENCES = 64
"""Training sequences, the first ones, from which input channels get what they count."""
COARSE, FINE = 24, 12
"""Scales that are tried with each zero point: over the whole range, and around the best of them. With 64 and
32, as published, the error on a real model's weights is the same to 0.04 % at 2 and 3 bits, and the search
takes 2.5 times as long."""
ZERO_POINTS = 16
"""Zero points that are tried at most: all of them up to 4 bits; with more, those around the one of the whole
span, since one that is far from it serves no range."""
VALUES, GPU_VALUES = 1 << 20, 1 << 24
"""Numbers that torch's form holds at once. On the CPU more of them leave the caches, fewer take longer to ask
for: 0.6 to 0.9 ns an error with 2^20, 1.3 with 2^18 and 2.3 with 2^17. The kernel holds none in memory, and
takes as many weights a launch."""


def zero_points(grid: Grid) -> int:
    """Zero points that are tried for a group; of a grid that fixes its own two where groups turn round, since
    that is what the other one stands for."""
    if grid.fixed_zero_point is not None:
        return 2 if grid.turns else 1
    return min(grid.top + 1, ZERO_POINTS)


def candidates(grid: Grid) -> int:
    """Pairs of scale and zero point that are tried for a group."""
    return (COARSE + FINE) * zero_points(grid)
