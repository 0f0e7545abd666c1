"""What a fixed zero point opens: layouts that hold one zero point for all weights, and none a group.

GGUF's simplest blocks keep an integer and a scale, and their zero point is part of what the type means:
``(q - 1) * d`` (Q2_0), ``(q - 8) * d`` (Q4_0), ``q * d`` with signed integers (Q8_0). Where a grid's is the
same and a block is no longer than a group, nothing is rounded again. Kernels for symmetric grids, the fastest
ones of most servers, have no place for other zero points than the middle.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.architecture.gguf_writing import block_type
from engine.config.grid import Grid


def opened(grid: Grid, inputs: Iterable[int]) -> str:
    """What can hold linears with so many inputs exactly because of the grid's fixed zero point, in words;
    empty where each group has its own."""
    fixed = grid.fixed_zero_point
    if fixed is None:
        return ""
    learned = Grid(grid.bits, grid.group_size)
    kinds = sorted({block_type(grid, width) for width in inputs} - {block_type(learned, 64)})
    holders = [f"exact in GGUF {' and '.join(kinds)}"] if kinds else []
    if grid.symmetric:
        holders.append("read by kernels for symmetric grids")
    return ": ".join(filter(None, (f"all {fixed}", ", ".join(holders))))
