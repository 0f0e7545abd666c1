"""Round to nearest: every weight to the closest point of its group's initial grid. No data, no training.

The baseline of every table, and the start of an end-to-end run without Block-AP (PEQA, arXiv 2305.14152).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from engine.config.grid import Grid, GridConfig
from engine.plan.memory_terms import HEAD_PART
from engine.quant.fake_linear import freeze_block, wrap_linears
from engine.quant.grid import initial_range, quantize
from engine.quant.packed import PackedBlock, PackedWeight, stored_scale


@torch.no_grad()
def round_to_nearest(block: nn.Module, names: tuple[str, ...], grid: GridConfig) -> PackedBlock:
    """Quantize the named linears of ``block`` (in place) and return the packed block."""
    linears = wrap_linears(block, grid.of_each(names), method=grid.range, norm=grid.search_norm)
    return freeze_block(block, linears)


@torch.no_grad()
def round_matrix(
    weight_OI: Tensor,
    grid: Grid,
    *,
    method: Literal["minmax", "search"],
    norm: float,
    poll: Callable[[], None] = lambda: None,
) -> PackedWeight:
    """Quantize a matrix that may be as long as a vocabulary, a part of its rows at a time; ``poll`` is called
    before each part, and may raise to stop."""
    parts: list[PackedWeight] = []
    for rows in weight_OI.split(max(1, HEAD_PART // weight_OI.shape[1])):
        poll()
        scale, zero = initial_range(rows, grid, method=method, norm=norm)
        scale = stored_scale(scale).float()  # as in a linear: the nearest value that a file can express
        codes = quantize(rows.float(), scale, zero, grid.bits)
        parts.append(PackedWeight.from_codes(codes, scale, zero, grid).to("cpu"))
    return PackedWeight(
        words=torch.cat([part.words for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat([part.zero_point for part in parts]),
        grid=grid,
    )
