"""Block-AP: block-wise training of all parameters (EfficientQAT, arXiv 2407.11062, section 3.2).

Decoder blocks are trained one after the other. Two activation streams lead up to block ``k``:

* the full-precision stream ``X``: what block ``k`` receives in the original model;
* the quantized stream ``X~``: what it receives when all earlier blocks are already quantized.

The block's target is ``Y = block(X)`` with the original weights; the student is the same block with
fake-quantized weights on ``X~``, so it learns to undo the error of its predecessors as well as its own:

    minimise  d( block_q(X~), block(X) )   over  W, s, z of every linear and the norms' weights.

Then the weights are rounded to the grid for good, and both streams advance by one block.

The distance ``d`` is the mean squared error, or (``token_relative_mse``) each token's squared error divided
by the mean square of its target. In many models the first token of a sequence carries activations thousands
of times larger than all others; under a plain mean it is the only one that counts, and float16 gradients
overflow on it. ``drop_largest`` leaves the largest squared errors out of the mean, whichever they are.

Scales and zero points start where the grid's own method puts them, or where a search for both finds the least
error that the inputs' channels weigh (:mod:`engine.methods.blockwise.start`); or weights, scales and zero
points start where GPTQ leaves them (:mod:`engine.methods.blockwise.gptq_block`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.config.block_ap import BlockAPConfig
from engine.config.gptq import GPTQConfig
from engine.config.grid import GridConfig
from engine.config.latents import Downcast
from engine.errors import NonFiniteError
from engine.gpu.compiled import SWITCH_HINT, Compiled
from engine.methods.blockwise.gptq_block import BlockOnStream, latents, rounded_at_a_time
from engine.methods.blockwise.reconstruction import Reconstruction, Streams, reconstruction_loss
from engine.methods.blockwise.start import AtOnce, Start, searched_start
from engine.methods.runaway import refuse_runaway
from engine.quant.fake_linear import freeze_block
from engine.quant.packed import PackedBlock
from engine.quant.range_search import values_at_a_time
from engine.training.loop import NON_FINITE_HINT, Settings, Training
from engine.training.progress import Keeper, Progress
from engine.training.snapshot import Snapshot
from engine.training.world import ALONE, World

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM


NOTED_START = ("start_sequences", "start_values")
"""Of a training: how much of its start was worked on at once (:class:`AtOnce`)."""


@dataclass(frozen=True)
class BlockResult:
    """A trained block and its reconstruction losses (in the configured distance).

    ``initial_loss`` and ``final_loss`` are measured on the same training sequences before and after training,
    ``val_loss`` is the best validation loss (none without validation sequences). ``micro_batch`` is the
    number of sequences at a time that memory sufficed for. ``latents`` are by linear what was rounded, where
    that was to be kept.
    """

    packed: PackedBlock
    initial_loss: float
    final_loss: float
    val_loss: float | None
    steps: int
    micro_batch: int
    latents: dict[str, Tensor] = field(default_factory=dict)


def train_block(
    lm: CausalLM,
    index: int,
    block: nn.Module,
    streams: Streams,
    config: BlockAPConfig,
    grid: GridConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    progress: Progress,
    micro_batch: int | None = None,
    snapshot: Snapshot | None = None,
    keeper: Keeper | None = None,
    world: World = ALONE,
    fast: bool = False,
    compiles: bool = False,
    kernels: bool = False,
    keeps: Downcast | None = None,
    gptq: GPTQConfig | None = None,
) -> BlockResult:
    """Quantize ``block`` (decoder block ``index``, float32, as it came) in place.

    ``streams.full`` has passed the block already, ``streams.quantized`` has not. ``dtype`` is the arithmetic
    of the forward pass; parameters are float32 throughout. ``micro_batch`` sequences pass at a time (all of a
    batch, when not given); ``snapshot`` is the state to continue from, ``keeper`` keeps such states. ``fast``
    takes the steps by :mod:`engine.methods.blockwise.fast_reconstruction` where that is possible (its kernel
    knows neither ``rounding`` nor ``clipping``),
    ``compiles`` compiles them. ``kernels`` has Triton search for where grids start, if that is possible.
    ``keeps`` is the form in which the latents behind the integers are kept; ``gptq`` says how a start from
    GPTQ is made, as by default when not given.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    fast = fast and bool(config.train) and not config.trains_parts
    kernels = kernels and config.start == "search"
    if (fast or kernels) and _obstacle_is_said(lm.device, index, progress, fast=fast, kernels=kernels):
        fast = kernels = False
    noted = {} if snapshot is None else snapshot.facts["noted"]
    values = rounded_at_a_time if config.start == "gptq" else values_at_a_time
    usual = micro_batch or config.batch_size, values(lm.device)
    at_once = AtOnce(*(int(noted.get(name, count)) for name, count in zip(NOTED_START, usual, strict=True)))
    start = None
    if config.start == "search":
        grids = grid.of_each(lm.linear_names(index))
        start = searched_start(lm, index, block, streams, grids, dtype, progress, at_once, kernel=kernels)
    elif config.start == "gptq":
        gptq = gptq or GPTQConfig()
        measured = streams.here(min(gptq.sequences, streams.train))
        on = BlockOnStream(lm, index, block, streams.quantized, measured, dtype, world)
        start = latents(on, gptq, grid, progress, at_once).start
    if start is not None:
        # Every rank has computed it from the same sums; that it is the same to the last bit is not left to
        # libraries.
        world.alike([*block.parameters(), *(one for pair in start.ranges.values() for one in pair)])
    reconstruction = _reconstruction(
        *(lm, index, block, streams, config, grid, dtype, progress), start=start, fast=fast, compiles=compiles
    )
    settings = Settings(
        epochs=config.epochs,
        batch_size=config.batch_size,
        micro_batch=micro_batch or config.batch_size,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        lr_final_fraction=config.lr_final_fraction,
        patience=config.patience,
        seed=seed,
        device=lm.device,
        dtype=dtype,
        where=f"block {index}",
        tokens_per_sequence=streams.full.shape[1],
        world=world,
    )
    training = Training(reconstruction, streams.train, settings, progress, snapshot, keeper)
    for linear in reconstruction.linears.values():
        linear.keep_sides()
    if start is not None:
        training.position.noted.update(zip(NOTED_START, start.at_once, strict=True))
    result = _trained(reconstruction, training, trains=bool(config.train), keeps=keeps)
    result.packed.install(block)
    return result


def _trained(
    reconstruction: Reconstruction, training: Training, *, trains: bool, keeps: Downcast | None
) -> BlockResult:
    """Train, between two measurements of the loss, and round to the grid."""
    reconstruction.poll = training.boundary
    noted = training.position.noted
    if "initial_loss" not in noted:
        noted["initial_loss"] = _report_loss(reconstruction, training)
    if trains:
        training.run()
    final = _report_loss(reconstruction, training)
    position = training.position
    if not math.isfinite(final):
        # Every later block would be trained on what this one puts out.
        raise NonFiniteError(
            f"the block's output is not finite after {position.steps_done} steps",
            where=training.settings.where,
            hint=NON_FINITE_HINT,
        )
    if trains:
        scales = (linear.scale for linear in reconstruction.linears.values())
        refuse_runaway(scales, position.steps_done, training.settings.where)
    reconstruction.close()  # rounding wants the memory
    return BlockResult(
        freeze_block(reconstruction.block, reconstruction.linears),
        position.noted["initial_loss"],
        final,
        training.best.val_loss,
        position.steps_done,
        position.micro_batch,
        {name: linear.kept_latent(keeps) for name, linear in reconstruction.linears.items()} if keeps else {},
    )


def _report_loss(reconstruction: Reconstruction, training: Training) -> float:
    """On the same training sequences before and after, of all ranks."""
    own = training.with_memory(reconstruction.report_loss)
    found = training.world.mean(own, reconstruction.reported())
    assert found is not None, "sequences are trained on"
    return found


def _reconstruction(
    lm: CausalLM,
    index: int,
    block: nn.Module,
    streams: Streams,
    config: BlockAPConfig,
    grid: GridConfig,
    dtype: torch.dtype,
    progress: Progress,
    start: Start | None,
    *,
    fast: bool,
    compiles: bool,
) -> Reconstruction:
    """In the fast form, and compiled, if that is wanted; what turns out to be impossible is said."""

    def slower(why: str) -> None:
        progress.warning("compile", f"block {index}: steps are slower, {why}", hint=SWITCH_HINT)

    arguments = (lm, index, block, streams, config, grid, dtype)
    ranges = None if start is None else start.ranges
    if fast:
        from engine.methods.blockwise.fast_reconstruction import FastReconstruction

        reconstruction: Reconstruction = FastReconstruction(
            *arguments, ranges=ranges, on_failure=lambda why: slower(f"they cannot be recorded: {why}")
        )
    else:
        reconstruction = Reconstruction(*arguments, ranges=ranges)
    if compiles:
        reconstruction.train_loss = Compiled(
            reconstruction_loss,
            expect_silence=progress.expect_silence,
            on_failure=lambda why: slower(f"they cannot be compiled: {why}"),
        )
    return reconstruction


def _obstacle_is_said(
    device: torch.device, index: int, progress: Progress, *, fast: bool, kernels: bool
) -> bool:
    """Whether Triton does not work here for what is wanted of it; then it is said."""
    obstacle = _obstacle(device, fast=fast, kernels=kernels)
    if obstacle:
        what = "steps and the search before them" if fast and kernels else "steps" if fast else "the search"
        message = f"block {index}: {what} {'are' if fast else 'is'} slower"
        progress.warning("compile", f"{message}, Triton does not work here: {obstacle}", hint=SWITCH_HINT)
    return bool(obstacle)


@functools.cache
def _obstacle(device: torch.device, *, fast: bool, kernels: bool) -> str:
    """Why fast steps, or the kernel of the search, are impossible on this device; empty where they work."""
    try:
        if fast:
            from engine.quant import quant_step, step_decision

            quant_step.try_out(device)
            step_decision.try_out(device)
        if kernels:
            from engine.quant import range_kernel

            range_kernel.try_out(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compiler, the host's compiler, the driver
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return ""
