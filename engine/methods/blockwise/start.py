"""Where Block-AP's grids start, when that follows from what a block's linears are given and not from their
weights alone (:mod:`engine.quant.range_search`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import Grid
from engine.methods.blockwise.streams import Streams
from engine.quant.range_search import channel_weights, search_range
from engine.quant.slots import slots
from engine.training.precision import autocast

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

SEQUENCES = 64
"""Of the training sequences, from which channels get what they count."""


@torch.no_grad()
def starting_ranges(
    lm: CausalLM,
    index: int,
    block: nn.Module,
    streams: Streams,
    config: BlockAPConfig,
    grids: Mapping[str, Grid],
    dtype: torch.dtype,
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Scale and zero point of each linear of a block as it came, by name; none where the grid's own method
    finds them."""
    if config.start == "range":
        return None
    channels: dict[str, Tensor] = {}
    if config.start != "mse":
        squares = input_squares(lm, index, block, streams, config, grids, dtype)
        channels = {name: channel_weights(of_linear) for name, of_linear in squares.items()}
    return {
        slot.name: search_range(
            slot.linear().weight,
            grids[slot.name],
            channels.get(slot.name),
            power=config.search_power,
            joint=config.start != "clip",
        )
        for slot in slots(block, grids)
    }


@torch.no_grad()
def input_squares(
    lm: CausalLM,
    index: int,
    block: nn.Module,
    streams: Streams,
    config: BlockAPConfig,
    names: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Of each linear the sum of squares that every input channel has over the quantized stream, float32
    ``[I]``; where tokens count ``relative``, each token's squares are divided by their mean."""
    sums: dict[str, Tensor] = {}

    def adds_to(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].float().square().flatten(0, -2)
            if config.search_tokens == "relative":
                squares /= squares.mean(-1, keepdim=True).clamp_(min=1e-30)
            sums[name] = sums.get(name, 0) + squares.sum(0)

        return hook

    hooks = [slot.linear().register_forward_pre_hook(adds_to(slot.name)) for slot in slots(block, names)]
    try:
        count = min(SEQUENCES, streams.train)
        for first in range(0, count, config.batch_size):
            hidden = streams.quantized.read(range(first, min(first + config.batch_size, count)))
            with autocast(lm.device, dtype):
                lm.run_block(block, index, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return sums
