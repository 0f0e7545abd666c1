"""GPTQ on a block: its linears in the order in which they are called, each on what those before it, rounded
already, give it.

Linears that are given the same tensor (query, key and value; gate and up) are one step of that order: one
Hessian serves them all, and their matrices are rounded as one. What shares a tensor is found by watching one
sequence pass, so it needs no list of families. The inputs are those of the quantized stream: the block is
rounded for what the rounded blocks before it will really hand it. A passage ends where the inputs in question
have been seen.

The block is left with its latents, the weights as they were when they were rounded (:mod:`gptq
<engine.methods.blockwise.gptq>`), and with their scales and zero points beside it. Rounding them gives GPTQ's
integers, and a training can go on from them. It could instead begin at the integers, in the middle of what
rounds to each; but then no weight would lie near the border to another integer, and those that GPTQ had moved
almost across one would be as far from it as all others. A latent keeps that, as the original weights do where
Block-AP begins with plain rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from engine.config.gptq import GPU_VALUES, VALUES, GPTQConfig
from engine.config.grid import Grid, GridConfig
from engine.config.latents import Downcast
from engine.methods.blockwise.gptq import (
    Ranges,
    Rounded,
    inverse_factor,
    round_matrix,
    round_to_nearest_point,
    without_strange,
)
from engine.methods.blockwise.start import LEAST_VALUES, AtOnce, Start, with_memory
from engine.quant.fake_linear import freeze_block, wrap_linears
from engine.quant.grid import initial_range
from engine.quant.packed import PackedBlock
from engine.quant.range_search import channel_weights, search_range
from engine.quant.slots import slots
from engine.training.loop import OTHERS_HINT
from engine.training.precision import autocast
from engine.training.progress import Progress
from engine.training.world import ALONE, World

if TYPE_CHECKING:
    from engine.data.activations import ActivationStore
    from engine.models.causal_lm import CausalLM

FACTORING_RATE = 5e9
"""Operations a second that a slow core does of the largest matrix it may factor and invert unheard."""


class Latents(NamedTuple):
    """Where GPTQ left a block, and by how much it errs: of each linear's output, squared errors over squares,
    in the mean over all linears; of GPTQ, and of plain rounding. ``kept`` are by linear what was rounded,
    where that was to be kept."""

    start: Start
    error: float
    plain_error: float
    kept: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class BlockOnStream:
    """A block as it came, in float32, and what it is given."""

    lm: CausalLM
    index: int
    block: nn.Module
    stream: ActivationStore
    """The quantized stream, which has not passed the block."""
    sequences: int
    """Of the stream, the first ones, that are measured; of those that lie on this rank."""
    dtype: torch.dtype
    """Of the forward pass."""
    world: World = ALONE


def gptq_block(
    on: BlockOnStream,
    config: GPTQConfig,
    grid: GridConfig,
    progress: Progress,
    at_once: AtOnce,
    *,
    keeps: Downcast | None = None,
) -> tuple[PackedBlock, Latents]:
    """Quantize a block in place, and say how that went. ``keeps`` is the form in which the latents behind the
    integers are kept."""
    found = latents(on, config, grid, progress, at_once)
    ranges = found.start.ranges
    on.world.alike([*on.block.parameters(), *(one for pair in ranges.values() for one in pair)])
    linears = wrap_linears(on.block, grid.of_each(ranges), ranges=ranges)
    packed = freeze_block(on.block, linears)
    packed.install(on.block)
    if keeps is not None:
        kept = {name: linear.kept_latent(keeps) for name, linear in linears.items()}
        found = found._replace(kept=kept)
    return packed, found


@torch.no_grad()
def latents(
    on: BlockOnStream,
    config: GPTQConfig,
    grid: GridConfig,
    progress: Progress,
    at_once: AtOnce,
) -> Latents:
    """Give a block the weights that GPTQ rounds; ``at_once`` is how much to begin with."""
    names = on.lm.linear_names(on.index)
    places = {slot.name: slot for slot in slots(on.block, names)}
    grids = grid.of_each(names)
    rounded: dict[str, Rounded] = {}
    for group in input_groups(on, grids):
        weight = torch.cat([places[name].linear().weight.float() for name in group])
        together, at_once = _round(on, group, weight, grids[group[0]], config, grid, progress, at_once)
        sizes = [len(places[name].linear().weight) for name in group]
        for name, *parts in zip(group, *(each.split(sizes) for each in together), strict=True):
            rounded[name] = Rounded(*parts)
            places[name].linear().weight.data = rounded[name].weight(grids[name].bits)
    for name, of_linear in rounded.items():
        places[name].linear().weight.data = of_linear.latent_OI
    ranges = {name: (rounded[name].scale_OG, rounded[name].zero_OG) for name in names}
    known = [one for one in rounded.values() if one.signal_O.sum() > 0]
    return Latents(
        Start(ranges, at_once),
        _mean([one.error_O.sum() / one.signal_O.sum() for one in known]),
        _mean([one.plain_error_O.sum() / one.signal_O.sum() for one in known]),
    )


def _mean(numbers: list[Tensor]) -> float:
    return float(torch.stack(numbers).mean()) if numbers else 0.0


def _round(
    on: BlockOnStream,
    group: tuple[str, ...],
    weight_OI: Tensor,
    of_group: Grid,
    config: GPTQConfig,
    grid: GridConfig,
    progress: Progress,
    at_once: AtOnce,
) -> tuple[Rounded, AtOnce]:
    """The matrices of linears that are given the same, one above the other."""

    def halved(what: str) -> Callable[[int, int], None]:
        def say(before: int, now: int) -> None:
            message = f"block {on.index}: out of memory {what.format(before=before, now=now)}"
            progress.warning("micro_batch", message, hint=OTHERS_HINT)

        return say

    def measure(sequences: int) -> Tensor | None:
        return hessian(on, group[0], progress, sequences)

    fewer = "with {before} sequences at a time; going on with {now}"
    found, sequences = with_memory(measure, at_once.sequences, 1, halved(fewer))
    found = _of_all_ranks(found, on.world, weight_OI)
    if found is None:
        ranges = _ranges(config, grid, None)
        return round_to_nearest_point(weight_OI, of_group, ranges), at_once._replace(sequences=sequences)
    progress.expect_silence(60 + len(found) ** 3 / FACTORING_RATE)
    channels = channel_weights(found.diagonal()) if config.scales == "search" else None
    _tell_of_infinite(on, group, found, progress)
    measured = without_strange(found)
    factor, damping = inverse_factor(measured, config.damping)
    if damping > config.damping:
        progress.warning(
            "damping",
            f"block {on.index}: the Hessian of {', '.join(group)} was damped by {damping:g} of its mean",
            hint="more text, or a larger gptq.damping, does that from the beginning",
        )

    def quantized(values: int) -> Rounded:
        ranges = _ranges(config, grid, channels)
        poll = progress.leave_if_asked
        return round_matrix(weight_OI, measured, factor, of_group, ranges, values=values, poll=poll)

    less = "while rounding; going on with half as many rows at a time"
    together, values = with_memory(quantized, at_once.values, LEAST_VALUES, halved(less))
    return together, AtOnce(sequences, values)


def _tell_of_infinite(
    on: BlockOnStream, group: tuple[str, ...], hessian_II: Tensor, progress: Progress
) -> None:
    infinite = int((~hessian_II.diagonal().isfinite()).sum())
    if infinite:
        progress.warning(
            "not_finite",
            f"block {on.index}: {infinite} of {len(hessian_II)} inputs of {', '.join(group)} are not finite "
            "everywhere, and their weights are rounded to nearest",
            hint="float16 overflows in some models: compute_dtype = bfloat16, or float32",
        )


def _of_all_ranks(found: Tensor | None, world: World, weight_OI: Tensor) -> Tensor | None:
    """The sum over what every rank's sequences give; none where none gives anything."""
    if not world.several:
        return found
    inputs = weight_OI.shape[1]
    if all(world.least([found is None])):
        return None
    total = torch.zeros((inputs, inputs), device=weight_OI.device) if found is None else found
    world.add_(total)
    return total


def rounded_at_a_time(device: torch.device) -> int:
    """How many weights are rounded together, where memory suffices."""
    return GPU_VALUES if device.type == "cuda" else VALUES


def _ranges(config: GPTQConfig, grid: GridConfig, channels_I: Tensor | None) -> Ranges:
    """How the configuration has scale and zero point chosen."""

    def choose(weight_OI: Tensor, of: Grid, first: int) -> tuple[Tensor, Tensor]:
        if config.scales == "range":
            return initial_range(weight_OI, of, method=grid.range, norm=grid.search_norm)
        channels = None if channels_I is None else channels_I[first : first + weight_OI.shape[1]]
        return search_range(weight_OI, of, channels)

    return choose


# -- what linears are given --------------------------------------------------------------------------------


class _Seen(Exception):
    """Ends a passage once the inputs in question have been seen."""


@torch.no_grad()
def input_groups(on: BlockOnStream, grids: Mapping[str, Grid]) -> list[tuple[str, ...]]:
    """The linears of a block in the order in which they are called, those together that are given one tensor
    and have one grid.

    Linears that nobody calls, because their weights are used in another way, are each by themselves at the
    end.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    alive: list[Tensor] = []  # else another tensor may come to lie in the same place

    def note(name: str, given: Tensor) -> None:
        key = (given.data_ptr(), given.shape, given.stride(), given.dtype, given._version, grids[name])
        alive.append(given)
        if not any(name in group for group in groups.values()):
            groups.setdefault(key, []).append(name)

    _watched(on, tuple(grids), note, range(1))
    called = {name for group in groups.values() for name in group}
    return [*map(tuple, groups.values()), *((name,) for name in grids if name not in called)]


@torch.no_grad()
def hessian(on: BlockOnStream, name: str, progress: Progress, batch: int) -> Tensor | None:
    """``X X^T`` of what the linear ``name`` is given over the stream, float32 ``[I, I]``, ``batch`` sequences
    at a time; none where it is given nothing. Of a linear that is called again and again, the first time
    counts."""
    total: list[Tensor] = []

    def add(name: str, given: Tensor) -> None:
        tokens_NI = given.flatten(0, -2).float()
        if not total:
            inputs = tokens_NI.shape[1]
            total.append(torch.zeros((inputs, inputs), device=given.device))
        total[0].addmm_(tokens_NI.t(), tokens_NI)
        raise _Seen

    for first in range(0, on.sequences, batch):
        progress.leave_if_asked()
        _watched(on, (name,), add, range(first, min(first + batch, on.sequences)))
    return total[0] if total else None


def _watched(
    on: BlockOnStream, names: tuple[str, ...], look: Callable[[str, Tensor], None], rows: range
) -> None:
    """Send some sequences through the block, and have ``look`` look at what these linears are given; it may
    end that by :class:`_Seen`."""

    def before(name: str) -> Callable[..., None]:
        return lambda module, inputs, named: look(name, inputs[0] if inputs else named["input"])

    hooks = [
        slot.linear().register_forward_pre_hook(before(slot.name), with_kwargs=True)
        for slot in slots(on.block, names)
    ]
    try:
        with autocast(on.lm.device, on.dtype):
            on.lm.run_block(on.block, on.index, on.stream.read(rows))
    except _Seen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
