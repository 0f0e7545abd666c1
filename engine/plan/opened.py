"""What a fixed zero point opens: layouts that hold one zero point for all weights, and none a group.

GGUF's simplest blocks keep an integer and a scale, and their zero point is part of what the type means:
``(q - 1) * d`` (Q2_0), ``(q - 8) * d`` (Q4_0), ``q * d`` with signed integers (Q8_0). Where a grid's is the
same and a block is no longer than a group, nothing is rounded again. Kernels for symmetric grids, the fastest
ones of most servers, have no place for other zero points than the middle.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.config.grid import Grid

EXACT_BLOCKS = {(2, 1): ("Q2_0", 64), (4, 8): ("Q4_0", 32), (8, 128): ("Q8_0", 32)}
"""By bits and zero point: GGUF's type, and how many weights of it share a scale."""


def opened(grid: Grid, inputs: Iterable[int]) -> str:
    """What can hold linears with so many inputs exactly because of the grid's fixed zero point, in words;
    empty where each group has its own."""
    fixed = grid.fixed_zero_point
    if fixed is None:
        return ""
    holders = []
    if (grid.bits, fixed) in EXACT_BLOCKS:
        kind, block = EXACT_BLOCKS[grid.bits, fixed]
        whole = all((width if grid.group_size == -1 else grid.group_size) % block == 0 for width in inputs)
        holders.append(f"exact in GGUF {kind}" if whole else f"GGUF {kind} wants groups of {block}")
    if grid.symmetric:
        holders.append("read by kernels for symmetric grids")
    return f"all {fixed}: {', '.join(holders)}"
