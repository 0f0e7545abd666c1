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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.data.sampler import ALONE, World
from engine.methods.compiled import Compiled
from engine.methods.optimization import (
    NON_FINITE_HINT,
    ParameterGroup,
    Progress,
    Snapshot,
    TrainingProgress,
    autocast,
)
from engine.methods.training import Settings, Training
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
    ``val_loss`` is the best validation loss (none without validation sequences). ``micro_batch`` is the
    number of sequences at a time that memory sufficed for.
    """

    packed: PackedBlock
    initial_loss: float
    final_loss: float
    val_loss: float | None
    steps: int
    micro_batch: int


def reconstruction_loss(
    block: nn.Module,
    hidden: Tensor,
    arguments: dict[str, Any],
    target: Tensor,
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """Distance between the block's output for ``hidden`` ``[B, T, H]`` and ``target``, a float32 scalar."""
    with autocast(hidden.device, dtype):
        output = block(hidden, **arguments)
    return distance(output[0] if isinstance(output, tuple) else output, target, kind)


def distance(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """Reconstruction loss of a batch ``[B, T, H]``, a float32 scalar."""
    target = target.float()
    squared = (output.float() - target).square().mean(-1)
    if kind == "token_relative_mse":
        squared = squared / target.square().mean(-1).clamp_(min=1e-12)
    return squared.mean()


class Passage:
    """How many sequences pass through a block at a time, at every point of a stream's way.

    When the GPU's memory does not suffice the number is halved from there on. Products of other sizes have
    other last bits, so where that happened is kept: a stream that is computed again must come out the same.
    """

    def __init__(self, batch: int, halvings: Iterable[Sequence[int]] = ()) -> None:
        self.batch = batch
        self.halvings = [(int(block), int(row)) for block, row in halvings]
        """Block and first sequence from which only half as many pass."""

    def at(self, block: int, row: int) -> int:
        """Sequences at a time."""
        return max(1, self.batch >> sum(halving <= (block, row) for halving in self.halvings))

    def halve(self, block: int, row: int) -> None:
        """Only half as many from here on."""
        self.halvings.append((block, row))


@torch.no_grad()
def advance(
    lm: CausalLM,
    index: int,
    block: nn.Module,
    stream: ActivationStore,
    passage: Passage,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    """Replace a stream by the block's output on it, batch by batch, in place.

    A stop may come between two batches and leave the stream half advanced: it is rebuilt on resume.
    """
    start = 0
    while start < stream.shape[0]:
        progress.checkpoint_requested()
        batch = passage.at(index, start)
        rows = slice(start, min(start + batch, stream.shape[0]))
        try:
            with autocast(lm.device, dtype):
                output = lm.run_block(block, index, stream.read(rows))
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        else:
            stream.write(start, output)
            start = rows.stop
            continue
        # After the handler: its traceback holds the tensors that have to go.
        torch.cuda.empty_cache()
        passage.halve(index, start)
        progress.warning(
            "micro_batch",
            f"block {index}: out of memory with {batch} sequences at a time; going on with {batch // 2}",
            hint="another process may be using the GPU; this run is only slower for it",
        )


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
    progress: TrainingProgress,
    micro_batch: int | None = None,
    snapshot: Snapshot | None = None,
    world: World = ALONE,
    compiles: bool = False,
) -> BlockResult:
    """Quantize ``block`` (decoder block ``index``, float32, as it came) in place.

    ``streams.full`` has passed the block already, ``streams.quantized`` has not. ``dtype`` is the arithmetic
    of the forward pass; parameters are float32 throughout. ``micro_batch`` sequences pass at a time (all of a
    batch, when not given); ``snapshot`` is the state to continue from; ``compiles`` compiles the steps.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    reconstruction = _Reconstruction(lm, index, block, streams, config, grid, dtype)
    if compiles:
        reconstruction.train_loss = Compiled(
            reconstruction_loss,
            expect_silence=progress.expect_silence,
            on_failure=lambda why: progress.warning(
                "compile",
                f"block {index}: not compiled, and slower for it: {why}",
                hint="runtime.compile=off does not try",
            ),
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
    training = Training(reconstruction, streams.train, settings, progress, snapshot)
    reconstruction.poll = training.boundary
    noted = training.position.noted
    if "initial_loss" not in noted:
        noted["initial_loss"] = training.with_memory(reconstruction.report_loss)
    if config.train:
        training.run()
    final = training.with_memory(reconstruction.report_loss)
    position = training.position
    if not math.isfinite(final):
        # Every later block would be trained on what this one puts out.
        raise NonFiniteError(
            f"the block's output is not finite after {position.steps_done} steps",
            where=f"block {index}",
            hint=NON_FINITE_HINT,
        )
    packed = freeze_block(block, reconstruction.linears)
    packed.install(block)
    return BlockResult(
        packed,
        position.noted["initial_loss"],
        final,
        training.best.val_loss,
        position.steps_done,
        position.micro_batch,
    )


class _Reconstruction:
    """A block with fake-quantized linears, measured against its own output at full precision."""

    def __init__(
        self,
        lm: CausalLM,
        index: int,
        block: nn.Module,
        streams: Streams,
        config: BlockAPConfig,
        grid: GridConfig,
        dtype: torch.dtype,
    ) -> None:
        self.lm, self.index, self.block, self.streams = lm, index, block, streams
        self.config, self.dtype = config, dtype
        self.linears = wrap_linears(block, lm.linear_names(index), grid)
        self.groups = _parameter_groups(block, self.linears, config)
        self.poll: Callable[[], None] = lambda: None
        self.train_loss: Callable[..., Tensor] = reconstruction_loss
        """What the steps minimise; compiled where that pays. Reports and validations stay plain."""

    def loss(self, rows: Tensor | slice, function: Callable[..., Tensor] = reconstruction_loss) -> Tensor:
        hidden, target = self.streams.quantized.read(rows), self.streams.full.read(rows)
        batch, length = hidden.shape[:2]
        arguments = self.lm.block_kwargs(self.index, batch, length, hidden.dtype)
        return function(self.block, hidden, arguments, target, self.config.loss, self.dtype)

    def micro_step(self, rows: Tensor, weight: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
        loss = self.loss(rows, self.train_loss) * weight
        scale(loss).backward()
        return loss.detach()

    def project(self) -> None:
        for linear in self.linears.values():
            linear.project()

    def validate(self, micro_batch: int) -> float | None:
        if self.streams.sequences == self.streams.train:
            return None
        return self.mean_loss(self.streams.train, self.streams.sequences, micro_batch)

    def report_loss(self, micro_batch: int) -> float:
        return self.mean_loss(0, min(self.streams.train, REPORT_SEQUENCES), micro_batch)

    @torch.no_grad()
    def mean_loss(self, first: int, last: int, micro_batch: int) -> float:
        """Mean loss over sequences ``first`` to ``last``."""
        total = torch.zeros((), dtype=torch.float64, device=self.lm.device)
        for start in range(first, last, micro_batch):
            self.poll()
            rows = slice(start, min(start + micro_batch, last))
            total += self.loss(rows).double() * (rows.stop - rows.start)
        return total.item() / (last - first)


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
