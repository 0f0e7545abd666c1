"""Where Block-AP's grids start, when that follows from what a block's linears are given and not from their
weights alone: a search of scale and zero point together (:mod:`engine.quant.range_search`).

What channels count is measured on the quantized stream, on which the block will be trained. Where memory does
not suffice, fewer sequences pass at a time and less is searched at a time. Sums of other sizes have other
last bits, so the snapshots of a training say with what it began: one that goes on begins with the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from engine.config.grid import Grid
from engine.config.joint_search import SEQUENCES
from engine.methods.blockwise.reconstruction import Streams
from engine.quant.range_search import channel_weights, search_range
from engine.quant.slots import slots
from engine.training.loop import OTHERS_HINT
from engine.training.precision import autocast
from engine.training.progress import Progress
from engine.training.world import World

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

LEAST_VALUES = 1 << 10
"""Of a search that gets on at all: then one row is tried with one scale at a time."""
T = TypeVar("T")


class AtOnce(NamedTuple):
    """How much of a start is worked on at once."""

    sequences: int
    values: int


class Start(NamedTuple):
    """Scale and zero point of each linear, by name, and how they were found."""

    ranges: dict[str, tuple[Tensor, Tensor]]
    at_once: AtOnce


@torch.no_grad()
def searched_start(
    lm: CausalLM,
    index: int,
    block: nn.Module,
    streams: Streams,
    grids: Mapping[str, Grid],
    dtype: torch.dtype,
    progress: Progress,
    at_once: AtOnce,
    *,
    kernel: bool = False,
) -> Start:
    """Of a block as it came; ``at_once`` is how much to begin with, ``kernel`` takes Triton's form."""

    def squares(sequences: int) -> dict[str, Tensor]:
        return input_squares(lm, index, block, streams, grids, dtype, progress, sequences)

    def ranges(values: int) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            slot.name: search_range(
                slot.linear().weight,
                grids[slot.name],
                channels.get(slot.name),
                kernel=kernel,
                values=values,
                poll=progress.leave_if_asked,
            )
            for slot in slots(block, grids)
        }

    def passes(before: int, now: int) -> None:
        what = f"out of memory with {before} sequences at a time; going on with {now}"
        progress.warning("micro_batch", f"block {index}: {what}", hint=OTHERS_HINT)

    def searches(before: int, now: int) -> None:
        what = "out of memory; searching for where it starts with half as much at a time"
        progress.warning("memory", f"block {index}: {what}", hint=OTHERS_HINT)

    found, sequences = with_memory(squares, at_once.sequences, 1, passes)
    found = _of_all_ranks(found, block, grids, streams.world)
    channels = {name: channel_weights(of_linear) for name, of_linear in found.items()}
    starts, values = with_memory(ranges, at_once.values, LEAST_VALUES, searches)
    return Start(starts, AtOnce(sequences, values))


def _of_all_ranks(
    found: dict[str, Tensor], block: nn.Module, grids: Mapping[str, Grid], world: World
) -> dict[str, Tensor]:
    """Sums over what every rank was given."""
    if not world.several:
        return found
    linears = {slot.name: slot.linear() for slot in slots(block, grids)}
    lacks = dict(zip(linears, world.least([name not in found for name in linears]), strict=True))
    for name, linear in linears.items():
        if name not in found:
            found[name] = torch.zeros(linear.weight.shape[1], device=linear.weight.device)
        world.add_(found[name])
    return {name: total for name, total in found.items() if not lacks[name]}


def with_memory(
    work: Callable[[int], T], amount: int, least: int, halved: Callable[[int, int], None]
) -> tuple[T, int]:
    """``work(amount)``, from its beginning with half as much while memory does not suffice; and with how much
    it did."""
    while True:
        try:
            return work(amount), amount
        except torch.OutOfMemoryError:
            if amount <= least:
                raise
        # After the handler: its traceback holds the tensors that have to go.
        torch.cuda.empty_cache()
        amount, before = max(least, amount // 2), amount
        halved(before, amount)


@torch.no_grad()
def input_squares(
    lm: CausalLM,
    index: int,
    block: nn.Module,
    streams: Streams,
    grids: Mapping[str, Grid],
    dtype: torch.dtype,
    progress: Progress,
    batch: int,
) -> dict[str, Tensor]:
    """Of each linear the sum of squares that every input channel has over the quantized stream, float32
    ``[I]``, ``batch`` sequences at a time; a linear that is given nothing (an expert that no token asks for)
    has none."""
    sums: dict[str, Tensor] = {}

    def adds_to(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            of_batch = inputs[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + of_batch if name in sums else of_batch

        return hook

    hooks = [slot.linear().register_forward_pre_hook(adds_to(slot.name)) for slot in slots(block, grids)]
    try:
        count = min(SEQUENCES, streams.train)
        count = streams.here(count)
        for first in range(0, count, batch):
            progress.leave_if_asked()
            hidden = streams.quantized.read(range(first, min(first + batch, count)))
            with autocast(lm.device, dtype):
                lm.run_block(block, index, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return sums
