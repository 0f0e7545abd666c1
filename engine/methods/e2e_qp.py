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

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from engine.data.sampler import ALONE, World
from engine.methods.compiled import Compiled
from engine.methods.optimization import NON_FINITE_HINT, ParameterGroup, Snapshot, TrainingProgress
from engine.methods.training import Method, Settings, Training
from engine.models.causal_lm import block_forward
from engine.quant.grid import RELATIVE_SCALE_FLOOR
from engine.quant.packed import PackedLinear
from engine.run.config import E2EQPConfig
from engine.run.errors import NonFiniteError

if TYPE_CHECKING:
    from engine.data.activations import ActivationStore
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

    store: ActivationStore
    rows: Tensor | None

    def read(self, rows: Tensor) -> Tensor:
        """Hidden states of the given sequences."""
        return self.store.read(rows if self.rows is None else self.rows[rows])

    def close(self) -> None:
        """Give the hidden states back."""
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
    teacher: Rows | None


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
    compiles: bool = False,
) -> E2EResult:
    """Train the quantization parameters inside ``blocks`` (packed decoder blocks, on the device), in place.

    ``snapshot`` is the state to continue from; ``compiles`` compiles the blocks' forward and backward.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    network = _Network(lm, blocks, data, config, dtype)
    if compiles:
        network.train_forward = Compiled(
            block_forward,
            expect_silence=progress.expect_silence,
            on_failure=lambda why: progress.warning(
                "compile",
                f"e2e_qp: steps are slower, blocks cannot be compiled: {why}",
                hint="runtime.compile=off does not try",
            ),
        )
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
    ) -> None:
        self.lm, self.blocks, self.data, self.config, self.dtype = lm, blocks, data, config, dtype
        self.groups = _parameter_groups(blocks, config)
        trained = {id(p) for group in self.groups for p in group.parameters}
        layers = [m for block in blocks for m in block.modules() if isinstance(m, PackedLinear)]
        # Each layer beside the smallest scales it may have; none where they are not trained.
        self.layers = [
            (layer, layer.scale.detach() * RELATIVE_SCALE_FLOOR if id(layer.scale) in trained else None)
            for layer in layers
        ]
        self.poll: Callable[[], None] = lambda: None
        self.train_forward: Callable[..., Tensor] = block_forward
        """A block's forward pass in the steps; compiled where that pays. Validations stay plain."""

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Last hidden states (before the final norm), ``[B, T, H]``."""
        hidden = self.lm.embed(tokens_BT).to(self.dtype)
        if not torch.is_grad_enabled():
            for index, block in enumerate(self.blocks):
                hidden = self.lm.run_block(block, index, hidden)
            return hidden
        # So that the first block is compiled like the others.
        hidden = hidden.detach().requires_grad_(self.train_forward is not block_forward)
        for index, block in enumerate(self.blocks):
            batch, length = tokens_BT.shape
            arguments = self.lm.block_kwargs(index, batch, length, hidden.dtype)
            if self.config.activation_checkpointing:
                # Nothing in a block is random, and asking a GPU for its generator's state waits for it.
                hidden = checkpoint(
                    self.train_forward,
                    block,
                    hidden,
                    arguments,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                hidden = self.train_forward(block, hidden, arguments)
        return hidden

    def chunk_loss(self, hidden_1TH: Tensor, labels_T: Tensor, teacher_1TH: Tensor | None) -> Tensor:
        """Summed loss of a chunk of tokens; ``labels`` holds their successors, -100 where there is none."""
        logits = self.lm.head(hidden_1TH)[0].float()
        if teacher_1TH is None:
            return functional.cross_entropy(logits, labels_T, reduction="sum", ignore_index=-100)
        with torch.no_grad():
            target = self.lm.head(teacher_1TH)[0].float().log_softmax(-1)
        return functional.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True)

    def head_loss(
        self, rows: Tensor, hidden: Tensor, weight: float, scale: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """``weight`` times the mean loss per predicted token of ``rows``.

        With ``scale`` it is also sent backward, scaled, and adds to ``hidden``'s gradient.
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
            if scale is not None:
                scale(loss).backward()
            total += loss.detach()
        return total

    def micro_step(self, rows: Tensor, weight: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = self.hidden(self.data.tokens[rows].to(self.lm.device))
        # The head's gradient is collected here chunk by chunk, then sent through the blocks once.
        last = hidden.detach().requires_grad_(True)
        loss = self.head_loss(rows, last, weight, scale)
        hidden.backward(last.grad)
        return loss

    @torch.no_grad()
    def validate(self, micro_batch: int) -> float | None:
        rows = torch.arange(self.data.train, self.data.tokens.shape[0])
        if not len(rows):
            return None
        total = torch.zeros((), device=self.lm.device)
        for part in rows.split(micro_batch):
            self.poll()
            hidden = self.hidden(self.data.tokens[part].to(self.lm.device))
            total += self.head_loss(part, hidden, len(part) / len(rows))
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
