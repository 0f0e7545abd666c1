"""E2E-QP: end-to-end training of quantization parameters (EfficientQAT, arXiv 2407.11062, section 3.3).

Block-AP has made every block match its own target; nothing has looked at the whole network yet. Here the
integers are fixed and only the scales (optionally the zero points) are trained, through all blocks at once,
on what the model is for: next-token cross-entropy, or the Kullback-Leibler divergence to the full-precision
model's prediction.

Memory: the weights stay packed (:class:`engine.quant.packed.PackedLinear` keeps no float copy), activations
can be recomputed block by block in the backward pass, and the logits never exist as a
whole (:mod:`engine.methods.network.head_loss`). The teacher's last hidden states were computed once, block by
block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.config.e2e_qp import E2EQPConfig
from engine.data.prefetch import Prefetcher, to_device
from engine.data.sampler import ALONE, World
from engine.errors import NonFiniteError
from engine.evaluation.perplexity import NO_LABEL
from engine.gpu.compiled import SWITCH_HINT, Compiled
from engine.methods.network.head_loss import HeadLoss
from engine.models.causal_lm import block_forward
from engine.quant.grid import RELATIVE_SCALE_FLOOR
from engine.quant.packed import PackedLinear
from engine.training.loop import Method, Settings, Training
from engine.training.stepper import NON_FINITE_HINT, ParameterGroup, Snapshot, TrainingProgress

if TYPE_CHECKING:
    from engine.data.activations import ActivationStore
    from engine.models.causal_lm import CausalLM


class Teacher:
    """The full-precision model's last hidden states; ``rows`` says where each sequence lies in the store."""

    def __init__(self, store: ActivationStore, rows: Tensor | None = None) -> None:
        self.store, self._rows = store, rows
        self._prefetch = Prefetcher((store,))

    def read(self, rows: Tensor) -> Tensor:
        """Hidden states ``[len(rows), T, H]`` of the given sequences, on the device."""
        (hidden_BTH,) = self._prefetch.read(self._places(rows))
        return hidden_BTH

    def expect(self, rows: Tensor) -> None:
        """They will be read next."""
        self._prefetch.expect(self._places(rows))

    def _places(self, rows: Tensor) -> Tensor:
        return rows if self._rows is None else self._rows[rows]

    def close(self) -> None:
        """Give the hidden states back."""
        self._prefetch.close()
        self.store.close()


def positions(wanted: Tensor, present: Tensor) -> Tensor | None:
    """Where each row of ``wanted`` is among the rows of ``present``; none unless all of them are there."""
    if wanted.shape[1:] != present.shape[1:]:
        return None
    known = {row.numpy().tobytes(): index for index, row in enumerate(present.contiguous())}
    found = [known.get(row.numpy().tobytes()) for row in wanted.contiguous()]
    return None if None in found else torch.tensor(found)


@dataclass(frozen=True)
class E2EData:
    """Token windows ``[N, T]`` (training, then validation) and, for KL, the teacher's last hidden states."""

    tokens: Tensor
    train: int
    teacher: Teacher | None


class _Batch(NamedTuple):
    tokens_BT: Tensor
    labels_T: Tensor
    """Of all sequences one after the other; -100 where a sequence ends."""
    teacher_TH: Tensor | None
    predictions: int


@dataclass(frozen=True)
class E2EResult:
    """Losses on the validation sequences before training and at its best (none without any)."""

    initial_loss: float | None
    val_loss: float | None
    steps: int


def train_scales(
    lm: CausalLM,
    blocks: list[nn.Module],
    data: E2EData,
    config: E2EQPConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    progress: TrainingProgress,
    snapshot: Snapshot | None = None,
    world: World = ALONE,
    recompute: bool = True,
    compiles: bool = False,
) -> E2EResult:
    """Train the quantization parameters inside ``blocks`` (packed decoder blocks, on the device), in place.

    ``snapshot`` is the state to continue from; ``recompute`` computes each block's activations again in the
    backward pass instead of keeping them; ``compiles`` compiles the blocks' forward and backward, and the
    losses.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    network = _Network(lm, blocks, data, config, dtype, recompute)
    if compiles:
        network.compile(progress)
    settings = Settings(
        epochs=config.epochs,
        batch_size=config.batch_size,
        micro_batch=config.micro_batch_size,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        lr_final_fraction=config.lr_final_fraction,
        patience=config.patience,
        seed=seed,
        device=lm.device,
        dtype=dtype,
        where="e2e_qp",
        tokens_per_sequence=data.tokens.shape[1],
        warmup_fraction=config.warmup_fraction,
        world=world,
    )
    training = Training(network, data.train, settings, progress, snapshot)
    network.poll = training.boundary
    training.run()
    position, best = training.position, training.best.val_loss
    if position.initial_val is not None and best is None:
        raise NonFiniteError(
            f"the validation loss is not finite after {position.steps_done} steps",
            where="e2e_qp",
            hint=NON_FINITE_HINT,
        )
    return E2EResult(position.initial_val, best, position.steps_done)


class _Network(Method):
    """All packed blocks together, measured by what they predict."""

    def __init__(
        self,
        lm: CausalLM,
        blocks: list[nn.Module],
        data: E2EData,
        config: E2EQPConfig,
        dtype: torch.dtype,
        recompute: bool,
    ) -> None:
        self.lm, self.blocks, self.data, self.dtype = lm, blocks, data, dtype
        self.recompute = recompute
        self.groups = _parameter_groups(blocks, config)
        trained = {id(p) for group in self.groups for p in group.parameters}
        layers = [m for block in blocks for m in block.modules() if isinstance(m, PackedLinear)]
        # Each layer beside the smallest scales it may have; none where they are not trained.
        self.layers = [
            (layer, layer.scale.detach() * RELATIVE_SCALE_FLOOR if id(layer.scale) in trained else None)
            for layer in layers
        ]
        self.poll: Callable[[], None] = lambda: None
        self.head = HeadLoss(lm)
        self._train_forward: Callable[..., Tensor] = block_forward
        """A block's forward pass in the steps; compiled where that pays. Validations stay plain."""

    def compile(self, progress: TrainingProgress) -> None:
        """Compile the blocks' steps and the losses; what cannot be is said and stays as it is."""

        def slower(what: str) -> Callable[[str], None]:
            return lambda why: progress.warning(
                "compile",
                f"e2e_qp: steps are slower, {what} cannot be compiled: {why}",
                hint=SWITCH_HINT,
            )

        self._train_forward = Compiled(
            block_forward, expect_silence=progress.expect_silence, on_failure=slower("blocks")
        )
        self.head.compile(expect_silence=progress.expect_silence, on_failure=slower("losses"))

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Last hidden states (before the final norm), ``[B, T, H]``."""
        hidden = self.lm.embed(tokens_BT).to(self.dtype)
        if not torch.is_grad_enabled():
            for index, block in enumerate(self.blocks):
                hidden = self.lm.run_block(block, index, hidden)
            return hidden
        # So that the first block is compiled like the others.
        hidden = hidden.detach().requires_grad_(self._train_forward is not block_forward)
        batch, length = tokens_BT.shape
        for index, block in enumerate(self.blocks):
            arguments = self.lm.block_kwargs(index, batch, length, hidden.dtype)
            if self.recompute:
                # Nothing in a block is random, and asking a GPU for its generator's state waits for it.
                hidden = checkpoint(
                    self._train_forward,
                    block,
                    hidden,
                    arguments,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                hidden = self._train_forward(block, hidden, arguments)
        return hidden

    def batch(self, rows: Tensor) -> _Batch:
        """What is read, and what is to be predicted."""
        tokens = self.data.tokens[rows]
        labels = torch.full_like(tokens, NO_LABEL)
        labels[:, :-1] = tokens[:, 1:]
        tokens, labels = to_device(tokens, self.lm.device), to_device(labels, self.lm.device)
        if self.data.teacher is None:
            return _Batch(tokens, labels.flatten(), None, tokens.numel() - len(rows))
        return _Batch(tokens, labels.flatten(), self.data.teacher.read(rows).flatten(0, 1), tokens.numel())

    def micro_step(self, rows: Tensor, weight: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
        batch = self.batch(rows)
        hidden_BTH = self.hidden(batch.tokens_BT)
        # Every position is predicted from its own hidden state alone: the batch is one row of tokens.
        flat_TH = hidden_BTH.detach().flatten(0, 1)
        loss, gradient_TH = self.head.gradient(
            flat_TH, batch.labels_T, batch.teacher_TH, weight / batch.predictions, scale
        )
        hidden_BTH.backward(gradient_TH.view_as(hidden_BTH))
        return loss

    def upcoming(self, rows: Tensor) -> None:
        if self.data.teacher is not None:
            self.data.teacher.expect(rows)

    def save_memory(self) -> str:
        if self.recompute:
            return ""
        self.recompute = True
        return "recomputing activations"

    @torch.no_grad()
    def validate(self, micro_batch: int) -> float | None:
        rows = torch.arange(self.data.train, self.data.tokens.shape[0])
        if not len(rows):
            return None
        total = torch.zeros((), device=self.lm.device)
        for part in rows.split(micro_batch):
            self.poll()
            batch = self.batch(part)
            flat_TH = self.hidden(batch.tokens_BT).flatten(0, 1)
            loss = self.head.value(flat_TH, batch.labels_T, batch.teacher_TH)
            total += loss * (len(part) / len(rows) / batch.predictions)
        return total.item()

    @torch.no_grad()
    def project(self) -> None:
        """Bring scales and zero points back into their domain, so that what is trained can be saved."""
        for layer, floor in self.layers:
            if floor is not None:
                layer.scale.copy_(torch.maximum(layer.scale, floor))
            if layer.zero_point.is_floating_point():
                layer.zero_point.clamp_(0, 2**layer.bits - 1)


def _parameter_groups(blocks: list[nn.Module], config: E2EQPConfig) -> list[ParameterGroup]:
    """Scales and zero points of every packed linear; relative learning rates as in Block-AP."""
    assert config.lr is not None, "the configuration is not resolved"
    groups: list[ParameterGroup] = []
    for block in blocks:
        for module in block.modules():
            if not isinstance(module, PackedLinear):
                continue
            unit = module.scale.mean().item() if config.lr_scaling == "relative" else 1.0
            if "scales" in config.train:
                module.scale.requires_grad_(True)
                groups.append(ParameterGroup("scales", [module.scale], config.lr * unit))
            if "zero_points" in config.train and not module.symmetric:
                lr = config.lr
                groups.append(ParameterGroup("zero_points", [module.train_zero_points()], lr))
    return groups
