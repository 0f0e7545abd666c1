"""Round to nearest: every weight to the closest point of its group's initial grid. No data, no training.

The baseline of every table, and the start of an end-to-end run without Block-AP (PEQA, arXiv 2305.14152).
"""

from __future__ import annotations

import torch
from torch import nn

from engine.config.grid import GridConfig
from engine.quant.fake_linear import freeze_block, wrap_linears
from engine.quant.packed import PackedBlock


@torch.no_grad()
def round_to_nearest(block: nn.Module, names: tuple[str, ...], grid: GridConfig) -> PackedBlock:
    """Quantize the named linears of ``block`` (in place) and return the packed block."""
    linears = wrap_linears(block, grid.of_each(names), method=grid.range, norm=grid.search_norm)
    return freeze_block(block, linears)
