"""E2E-QP: end-to-end training of quantization parameters (EfficientQAT, arXiv 2407.11062, section 3.3).

Block-AP has made every block match its own target; nothing has looked at the whole network yet. Here the
integers are fixed and only the scales (optionally the zero points) are trained, through all blocks at once,
on what the model is for: next-token cross-entropy, or the Kullback-Leibler divergence to the full-precision
model's prediction.

Memory: the weights stay packed (:class:`engine.quant.packed.PackedLinear` keeps no float copy), activations
can be recomputed block by block in the backward pass, and the logits never exist as a whole: the head runs
over chunks of tokens, each chunk's gradient is taken at once and added up at the last hidden state.

The teacher costs no second model: its last hidden states were computed once, block by block, and the head
that turns them into logits is the student's own, since the head is not quantized.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from engine.data.sampler import ALONE, BatchSampler, World
from engine.methods.optimization import (
    NON_FINITE_HINT,
    BestState,
    ParameterGroup,
    Progress,
    Stepper,
    cosine_factor,
    with_rollback,
)
from engine.quant.grid import RELATIVE_SCALE_FLOOR
from engine.quant.packed import PackedLinear
from engine.run.config import E2EQPConfig
from engine.run.errors import NonFiniteError

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

# Tokens whose logits exist at the same time: 512 x 128k vocabulary x 4 bytes is a quarter of a GiB.
HEAD_CHUNK_TOKENS = 512


class Rows(Protocol):
    """Hidden states ``[N, T, H]`` by sequence."""

    def read(self, rows: Tensor) -> Tensor:
        """``[len(rows), T, H]`` on the compute device."""


@dataclass(frozen=True)
class Teacher:
    """The full-precision model's last hidden states; ``rows`` says where each sequence lies in the store."""

    store: Rows
    rows: Tensor | None

    def read(self, rows: Tensor) -> Tensor:
        """Hidden states of the given sequences."""
        return self.store.read(rows if self.rows is None else self.rows[rows])


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
    teacher: Rows | None


@dataclass(frozen=True)
class E2EResult:
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
    progress: Progress,
    world: World = ALONE,
) -> E2EResult:
    """Train the quantization parameters inside ``blocks`` (packed decoder blocks, on the device), in place.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    trainer = _EndToEndTrainer(lm, blocks, data, config, seed, dtype, progress, world)
    with_rollback(trainer.train, progress, where="e2e_qp", restore=trainer.state.restart)
    if trainer.initial_val is not None and trainer.state.val_loss is None:
        raise NonFiniteError(
            f"the validation loss is not finite after {trainer.steps_done} steps",
            where="e2e_qp",
            hint=NON_FINITE_HINT,
        )
    return E2EResult(trainer.initial_val, trainer.state.val_loss, trainer.steps_done)


class _EndToEndTrainer:
    def __init__(
        self,
        lm: CausalLM,
        blocks: list[nn.Module],
        data: E2EData,
        config: E2EQPConfig,
        seed: int,
        dtype: torch.dtype,
        progress: Progress,
        world: World,
    ) -> None:
        self.world = world
        self.lm, self.blocks, self.data, self.config = lm, blocks, data, config
        self.seed, self.dtype, self.progress = seed, dtype, progress
        self.groups = _parameter_groups(blocks, config)
        self.state = BestState([p for group in self.groups for p in group.parameters])
        starts = {id(p): value for p, value in zip(self.state.parameters, self.state.start, strict=True)}
        layers = [m for block in blocks for m in block.modules() if isinstance(m, PackedLinear)]
        # Each layer beside the scales it started from; none where they are not trained.
        self.layers = [(layer, starts.get(id(layer.scale))) for layer in layers]
        self.initial_val: float | None = None
        self.steps_done = 0

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Last hidden states (before the final norm), ``[B, T, H]``."""
        hidden = self.lm.embed(tokens_BT).to(self.dtype)
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            if recompute:
                hidden = checkpoint(self.lm.run_block, block, index, hidden, use_reentrant=False)
            else:
                hidden = self.lm.run_block(block, index, hidden)
        return hidden

    def chunk_loss(self, hidden_1TH: Tensor, labels_T: Tensor, teacher_1TH: Tensor | None) -> Tensor:
        """Summed loss of a chunk of tokens; ``labels`` holds their successors, -100 where there is none."""
        logits = self.lm.head(hidden_1TH)[0].float()
        if teacher_1TH is None:
            return functional.cross_entropy(logits, labels_T, reduction="sum", ignore_index=-100)
        with torch.no_grad():
            target = self.lm.head(teacher_1TH)[0].float().log_softmax(-1)
        return functional.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True)

    def head_loss(self, rows: Tensor, hidden: Tensor, weight: float, backward: bool) -> Tensor:
        """``weight`` times the mean loss per predicted token of ``rows``; adds to ``hidden``'s gradient.

        The head works on every position alone, so the batch is one long row of tokens to it.
        """
        tokens = self.data.tokens[rows].to(self.lm.device)
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        teacher = None if self.data.teacher is None else self.data.teacher.read(rows).flatten(0, 1)
        predictions = tokens.numel() if teacher is not None else tokens.numel() - len(rows)
        flat_TH, labels_T = hidden.flatten(0, 1), labels.flatten()
        total = torch.zeros((), device=self.lm.device)
        for start in range(0, len(flat_TH), HEAD_CHUNK_TOKENS):
            part = slice(start, start + HEAD_CHUNK_TOKENS)
            teacher_part = None if teacher is None else teacher[None, part]
            loss = self.chunk_loss(flat_TH[None, part], labels_T[part], teacher_part) * (weight / predictions)
            if backward:
                self.stepper.scale(loss).backward()
            total += loss.detach()
        return total

    def micro_step(self, rows: Tensor, weight: float) -> Tensor:
        """Forward and backward of one micro-batch; returns its weighted loss."""
        hidden = self.hidden(self.data.tokens[rows].to(self.lm.device))
        # The head's gradient is collected here chunk by chunk, then sent through the blocks once.
        last = hidden.detach().requires_grad_(True)
        loss = self.head_loss(rows, last, weight, backward=True)
        hidden.backward(last.grad)
        return loss

    @torch.no_grad()
    def validate(self) -> float | None:
        rows = torch.arange(self.data.train, self.data.tokens.shape[0])
        if not len(rows):
            return None
        total = torch.zeros((), device=self.lm.device)
        for part in rows.split(self.config.micro_batch_size):
            self.progress.checkpoint_requested()
            hidden = self.hidden(self.data.tokens[part].to(self.lm.device))
            total += self.head_loss(part, hidden, len(part) / len(rows), backward=False)
        return total.item()

    def train(self, lr_factor: float) -> None:
        config = self.config
        self.stepper = Stepper(
            self.groups,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            device=self.lm.device,
            dtype=self.dtype,
        )
        sampler = BatchSampler(self.data.train, config.batch_size, config.epochs, self.seed, *self.world)
        warmup = math.ceil(config.warmup_fraction * sampler.steps)
        self.initial_val = self.validate()
        self.state.keep_if_best(self.initial_val)
        stale, last_epoch = 0, 0
        loss = torch.zeros((), device=self.lm.device)
        for epoch, step, rows in sampler:
            if epoch != last_epoch:
                stale = 0 if self._end_of_epoch(step, sampler.steps, last_epoch, loss) else stale + 1
                last_epoch = epoch
                if config.patience and stale >= config.patience:
                    break
            self.stepper.set_lr(
                lr_factor * cosine_factor(step, sampler.steps, config.lr_final_fraction, warmup)
            )
            loss = torch.zeros((), device=self.lm.device)
            for part in rows.split(config.micro_batch_size):
                loss += self.micro_step(part, len(part) / len(rows))
            self.stepper.step(loss)
            self._project()
            self.steps_done += 1
            self._after_step(step, sampler.steps, epoch, loss)
        else:
            self._end_of_epoch(sampler.steps, sampler.steps, last_epoch, loss)
        self.state.load_best()

    @torch.no_grad()
    def _project(self) -> None:
        """Bring scales and zero points back into their domain, so that what is trained can be saved."""
        for layer, start in self.layers:
            if start is not None:
                layer.scale.copy_(torch.maximum(layer.scale, start * RELATIVE_SCALE_FLOOR))
            if layer.zero_point.is_floating_point():
                layer.zero_point.clamp_(0, 2**layer.bits - 1)

    def _after_step(self, step: int, steps: int, epoch: int, loss: Tensor) -> None:
        if self.progress.due():
            self.stepper.check(step)
            self.progress.metric(
                step=step + 1,
                steps=steps,
                epoch=epoch,
                loss=loss.item(),
                grad_norm=self.stepper.grad_norm.item(),
                lr=self.stepper.lr(),
                tokens=self.steps_done * self.config.batch_size * self.data.tokens.shape[1],
            )
        self.progress.checkpoint_requested()

    def _end_of_epoch(self, step: int, steps: int, epoch: int, loss: Tensor) -> bool:
        """Validate and keep the best; True when this epoch improved (always, without validation)."""
        self.stepper.check(step, last=step == steps)
        val = self.validate()
        if val is None:
            return True
        self.progress.metric(step=step, steps=steps, epoch=epoch, loss=loss.item(), val_loss=val)
        return self.state.keep_if_best(val)


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
