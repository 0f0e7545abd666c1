"""What a fixed zero point opens: layouts that hold one zero point for all weights, and none a group.

GGUF's simplest blocks keep an integer and a scale, and their zero point is part of what the type means: which
one holds a grid is :func:`~engine.architecture.gguf_writing.block_type`'s to say. Kernels for symmetric
grids, the fastest ones of most servers, have no place for other zero points than the middle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from engine.architecture.gguf_writing import block_type
from engine.config.grid import Grid

WIDE = 64
"""Weights of a group that every type of block divides."""


def opened(grid: Grid, inputs: Iterable[int]) -> str:
    """What can hold linears with so many inputs exactly because of the grid's fixed zero point, in words;
    empty where each group has its own."""
    if grid.fixed_zero_point is None:
        return ""
    widths = set(inputs)
    here = {_opened_type(grid, width) for width in widths}
    wide = _opened_type(replace(grid, group_size=WIDE), WIDE)
    holders = []
    if wide and here == {wide}:
        holders.append(f"exact in GGUF {wide}")
    elif wide:
        holders.append(f"exact in GGUF {wide} in groups of {WIDE}")
    if grid.symmetric:
        holders.append("read by kernels for symmetric grids")
    return f"all {grid.fixed_zero_point}: {', '.join(holders)}"


def _opened_type(grid: Grid, inputs: int) -> str:
    """The type of block that holds the grid; empty where it is that of groups with zero points of their
    own."""
    held = block_type(grid, inputs)
    return held if held != block_type(Grid(grid.bits, grid.group_size), inputs) else ""
