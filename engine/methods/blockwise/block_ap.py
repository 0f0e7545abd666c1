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
overflow on it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.errors import NonFiniteError
from engine.gpu.compiled import SWITCH_HINT, Compiled
from engine.methods.blockwise.reconstruction import Reconstruction, Streams, reconstruction_loss
from engine.methods.runaway import refuse_runaway
from engine.quant.fake_linear import freeze_block
from engine.quant.packed import PackedBlock
from engine.training.loop import NON_FINITE_HINT, Settings, Training
from engine.training.progress import Keeper, Progress
from engine.training.snapshot import Snapshot
from engine.training.world import ALONE, World

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM


@dataclass(frozen=True)
class BlockResult:
    """A trained block and its reconstruction losses (in the configured distance).

    ``initial_loss`` and ``final_loss`` are measured on the same training sequences before and after training,
    ``val_loss`` is the best validation loss (none without validation sequences). ``micro_batch`` is the
    number of sequences at a time that memory sufficed for.
    """

    packed: PackedBlock
    initial_loss: float
    final_loss: float
    val_loss: float | None
    steps: int
    micro_batch: int


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
) -> BlockResult:
    """Quantize ``block`` (decoder block ``index``, float32, as it came) in place.

    ``streams.full`` has passed the block already, ``streams.quantized`` has not. ``dtype`` is the arithmetic
    of the forward pass; parameters are float32 throughout. ``micro_batch`` sequences pass at a time (all of a
    batch, when not given); ``snapshot`` is the state to continue from, ``keeper`` keeps such states. ``fast``
    takes the steps by :mod:`engine.methods.blockwise.fast_reconstruction` where that is possible,
    ``compiles`` compiles them.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    reconstruction = _reconstruction(
        lm, index, block, streams, config, grid, dtype, progress, fast=fast, compiles=compiles
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
    result = _trained(reconstruction, training, trains=bool(config.train))
    result.packed.install(block)
    return result


def _trained(reconstruction: Reconstruction, training: Training, *, trains: bool) -> BlockResult:
    """Train, between two measurements of the loss, and round to the grid."""
    reconstruction.poll = training.boundary
    noted = training.position.noted
    if "initial_loss" not in noted:
        noted["initial_loss"] = training.with_memory(reconstruction.report_loss)
    if trains:
        training.run()
    final = training.with_memory(reconstruction.report_loss)
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
    )


def _reconstruction(
    lm: CausalLM,
    index: int,
    block: nn.Module,
    streams: Streams,
    config: BlockAPConfig,
    grid: GridConfig,
    dtype: torch.dtype,
    progress: Progress,
    *,
    fast: bool,
    compiles: bool,
) -> Reconstruction:
    """In the fast form, and compiled, if that is wanted and possible here; what is not possible is said."""

    def slower(why: str) -> None:
        progress.warning("compile", f"block {index}: steps are slower, {why}", hint=SWITCH_HINT)

    arguments = (lm, index, block, streams, config, grid, dtype)
    obstacle = _obstacle(lm.device) if fast and config.train else ""
    if obstacle:
        slower(f"Triton does not work here: {obstacle}")
    if fast and config.train and not obstacle:
        from engine.methods.blockwise.fast_reconstruction import FastReconstruction

        reconstruction: Reconstruction = FastReconstruction(
            *arguments, on_failure=lambda why: slower(f"they cannot be recorded: {why}")
        )
    else:
        reconstruction = Reconstruction(*arguments)
    if compiles:
        reconstruction.train_loss = Compiled(
            reconstruction_loss,
            expect_silence=progress.expect_silence,
            on_failure=lambda why: slower(f"they cannot be compiled: {why}"),
        )
    return reconstruction


@functools.cache
def _obstacle(device: torch.device) -> str:
    """Why the fast form is impossible on this device; empty where it works."""
    try:
        from engine.quant.quant_step import try_out

        try_out(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compiler, the host's compiler, the driver
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return ""
