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

import math
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.data.sampler import ALONE, BatchSampler, World
from engine.methods.optimization import (
    NON_FINITE_HINT,
    BestState,
    ParameterGroup,
    Progress,
    Stepper,
    autocast,
    cosine_factor,
    with_rollback,
)
from engine.quant.fake_linear import FakeQuantLinear, freeze_block, wrap_linears
from engine.quant.packed import PackedBlock
from engine.run.config import BlockAPConfig, GridConfig
from engine.run.errors import NonFiniteError

if TYPE_CHECKING:
    from engine.data.activations import ActivationStore
    from engine.models.causal_lm import CausalLM

# Training sequences on which a block's loss is reported before and after; enough to be steady, few enough to
# be free.
REPORT_SEQUENCES = 16


@dataclass(frozen=True)
class Streams:
    """The two activation streams ``[N, T, H]``: ``train`` training sequences, then the validation
    sequences."""

    full: ActivationStore
    quantized: ActivationStore
    train: int

    @property
    def sequences(self) -> int:
        return self.full.shape[0]


@dataclass(frozen=True)
class BlockResult:
    """A trained block and its reconstruction losses (in the configured distance).

    ``initial_loss`` and ``final_loss`` are measured on the same training sequences before and after training,
    ``val_loss`` is the best validation loss (none without validation sequences).
    """

    packed: PackedBlock
    initial_loss: float
    final_loss: float
    val_loss: float | None
    steps: int


def distance(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """Reconstruction loss of a batch ``[B, T, H]``, a float32 scalar."""
    target = target.float()
    squared = (output.float() - target).square().mean(-1)
    if kind == "token_relative_mse":
        squared = squared / target.square().mean(-1).clamp_(min=1e-12)
    return squared.mean()


@torch.no_grad()
def advance(
    lm: CausalLM,
    index: int,
    block: nn.Module,
    stream: ActivationStore,
    batch: int,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    """Replace a stream by the block's output on it, batch by batch, in place.

    A stop may come between two batches and leave the stream half advanced: it is rebuilt on resume.
    """
    for start in range(0, stream.shape[0], batch):
        progress.checkpoint_requested()
        rows = slice(start, min(start + batch, stream.shape[0]))
        with autocast(lm.device, dtype):
            stream.write(start, lm.run_block(block, index, stream.read(rows)))


def train_block(
    lm: CausalLM,
    index: int,
    streams: Streams,
    config: BlockAPConfig,
    grid: GridConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    progress: Progress,
    world: World = ALONE,
) -> BlockResult:
    """Quantize decoder block ``index`` and advance both streams past it.

    ``dtype`` is the arithmetic of the forward pass; parameters are float32 throughout.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    block = lm.load_block(index, dtype=torch.float32)
    advance(lm, index, block, streams.full, config.batch_size, dtype, progress)

    trainer = _BlockTrainer(lm, index, block, streams, config, grid, seed, dtype, progress, world)
    initial = trainer.report_loss()
    if config.train:
        with_rollback(trainer.train, progress, where=f"block {index}", restore=trainer.state.restart)
    final = trainer.report_loss()
    if not math.isfinite(final):
        # Every later block would be trained on what this one puts out.
        raise NonFiniteError(
            f"the block's output is not finite after {trainer.steps_done} steps",
            where=f"block {index}",
            hint=NON_FINITE_HINT,
        )

    packed = freeze_block(block, trainer.linears)
    packed.install(block)
    advance(lm, index, block, streams.quantized, config.batch_size, dtype, progress)
    return BlockResult(packed, initial, final, trainer.state.val_loss, trainer.steps_done)


class _BlockTrainer:
    """State of one block's training: parameters, start and best copies, and the loop."""

    def __init__(
        self,
        lm: CausalLM,
        index: int,
        block: nn.Module,
        streams: Streams,
        config: BlockAPConfig,
        grid: GridConfig,
        seed: int,
        dtype: torch.dtype,
        progress: Progress,
        world: World,
    ) -> None:
        self.world = world
        self.lm, self.index, self.block, self.streams = lm, index, block, streams
        self.config, self.grid, self.seed, self.dtype, self.progress = config, grid, seed, dtype, progress
        self.linears = wrap_linears(block, lm.linear_names(index), grid)
        self.groups = _parameter_groups(block, self.linears, config)
        self.state = BestState([p for group in self.groups for p in group.parameters])
        self.steps_done = 0

    def loss(self, rows: Tensor | slice) -> Tensor:
        with autocast(self.lm.device, self.dtype):
            output = self.lm.run_block(self.block, self.index, self.streams.quantized.read(rows))
        return distance(output, self.streams.full.read(rows), self.config.loss)

    @torch.no_grad()
    def mean_loss(self, first: int, last: int) -> float:
        """Mean loss over sequences ``first`` to ``last``."""
        total = torch.zeros((), dtype=torch.float64, device=self.lm.device)
        for start in range(first, last, self.config.batch_size):
            self.progress.checkpoint_requested()
            rows = slice(start, min(start + self.config.batch_size, last))
            total += self.loss(rows).double() * (rows.stop - rows.start)
        return total.item() / (last - first)

    def report_loss(self) -> float:
        return self.mean_loss(0, min(self.streams.train, REPORT_SEQUENCES))

    def validate(self) -> float | None:
        if self.streams.sequences == self.streams.train:
            return None
        return self.mean_loss(self.streams.train, self.streams.sequences)

    def train(self, lr_factor: float) -> None:
        """All epochs from the current parameters; leaves the best validated ones in place."""
        config = self.config
        stepper = Stepper(
            self.groups,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            device=self.lm.device,
            dtype=self.dtype,
        )
        sampler = BatchSampler(self.streams.train, config.batch_size, config.epochs, self.seed, *self.world)
        self.state.keep_if_best(self.validate())
        stale = 0
        for epoch, batches in groupby(sampler, key=attrgetter("epoch")):
            for _, step, rows in batches:
                stepper.set_lr(lr_factor * cosine_factor(step, sampler.steps, config.lr_final_fraction))
                loss = self.loss(rows)
                stepper.scale(loss).backward()
                stepper.step(loss)
                for linear in self.linears.values():
                    linear.project()
                self.steps_done += 1
                self._after_step(stepper, step, sampler.steps, epoch, loss)
            stepper.check(step, last=step + 1 == sampler.steps)
            val = self.validate()
            improved = self.state.keep_if_best(val)
            if val is not None:
                self.progress.metric(
                    step=step + 1, steps=sampler.steps, epoch=epoch, loss=loss.item(), val_loss=val
                )
            stale = 0 if improved else stale + 1
            if config.patience and val is not None and stale >= config.patience:
                break
        self.state.load_best()

    def _after_step(self, stepper: Stepper, step: int, steps: int, epoch: int, loss: Tensor) -> None:
        if self.progress.due():
            stepper.check(step)
            self.progress.metric(
                step=step + 1,
                steps=steps,
                epoch=epoch,
                loss=loss.item(),
                grad_norm=stepper.grad_norm.item(),
                lr=stepper.lr(),
                tokens=self.steps_done * self.config.batch_size * self.streams.full.shape[1],
            )
        self.progress.checkpoint_requested()


def _parameter_groups(
    block: nn.Module, linears: dict[str, FakeQuantLinear], config: BlockAPConfig
) -> list[ParameterGroup]:
    """What is trained, at which learning rate; marks it as requiring gradients.

    A relative learning rate is a fraction of one grid step: Adam moves a parameter by about its learning rate
    per step, and what matters to a quantized weight is how many steps it takes to cross into the next
    integer.
    """
    assert config.lr_weight is not None, "the configuration is not resolved"
    assert config.lr_quant is not None, "the configuration is not resolved"
    relative = config.lr_scaling == "relative"
    groups: list[ParameterGroup] = []

    def add(kind: str, parameter: nn.Parameter, lr: float) -> None:
        parameter.requires_grad_(True)
        groups.append(ParameterGroup(kind, [parameter], lr))

    for linear in linears.values():
        unit = linear.scale.mean().item() if relative else 1.0
        if "weights" in config.train:
            add("weights", linear.weight, config.lr_weight * unit)
        if "scales" in config.train:
            add("scales", linear.scale, config.lr_quant * unit)
        if "zero_points" in config.train and not linear.grid.symmetric:
            # A zero point is counted in grid steps already.
            add("zero_points", linear.zero_point, config.lr_quant)
    if "norms" in config.train:
        inner = {id(p) for linear in linears.values() for p in linear.parameters()}
        for name, parameter in block.named_parameters():
            if id(parameter) not in inner and parameter.ndim == 1 and not name.endswith("bias"):
                unit = parameter.abs().mean().item() if relative else 1.0
                lr = config.lr_quant * unit if relative else config.lr_weight
                add("norms", parameter, lr)
    return _merge(groups)


def _merge(groups: list[ParameterGroup]) -> list[ParameterGroup]:
    """Join groups of the same kind and learning rate, so that the fused optimizer launches fewer kernels."""
    merged: dict[tuple[str, float], list[nn.Parameter]] = {}
    for group in groups:
        merged.setdefault((group.kind, group.lr), []).extend(group.parameters)
    return [ParameterGroup(kind, parameters, lr) for (kind, lr), parameters in merged.items()]
