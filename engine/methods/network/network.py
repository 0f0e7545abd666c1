"""The loss of all blocks together: what every end-to-end method minimises, whichever parameters it trains.

The blocks run one after the other on what the model is for: next-token cross-entropy, or the Kullback-Leibler
divergence to the full-precision model's prediction. A method (:mod:`engine.methods.network.e2e_qp`) brings
its parameters, as ``groups``, and brings them back into their domain after a step, in ``project``.

Of conversations only the answers count (:class:`engine.data.packing.Answers`): the loss is the mean over all
answer tokens of the batch, however they are spread over its micro-batches, and the head works on no other.

Memory: activations can be recomputed block by block in the backward pass, and the logits never exist as a
whole (:mod:`engine.methods.network.head_loss`). The teacher's last hidden states were computed before
(:mod:`engine.methods.network.teacher`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from engine.config.stage_section import TrainingSection
from engine.data.packing import Answers
from engine.data.prefetch import to_device
from engine.errors import NonFiniteError
from engine.evaluation.perplexity import NO_LABEL
from engine.gpu.compiled import SWITCH_HINT, Compiled
from engine.gpu.recorded import Graphed
from engine.methods.network.head_loss import HeadLoss
from engine.methods.network.teacher import Teacher
from engine.models.causal_lm import block_forward
from engine.training.loop import NON_FINITE_HINT, Method, Settings, Training
from engine.training.progress import Keeper, Progress
from engine.training.schedule import Schedule
from engine.training.snapshot import Snapshot
from engine.training.stepper import BETAS, Stepper
from engine.training.world import ALONE, World

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM


@dataclass(frozen=True)
class NetworkData:
    """Token windows ``[N, T]`` (training, then validation) and, for KL, the teacher's last hidden states."""

    tokens: Tensor
    train: int
    teacher: Teacher | None
    answers: Answers | None = None
    """What of the windows is to be learned; none where every token is."""
    world: World = ALONE
    """Whose ranks each have their share of it, and of what the teacher put out."""


@dataclass(frozen=True)
class NetworkResult:
    """Losses on the validation sequences before training and at its best (none without any)."""

    initial_loss: float | None
    val_loss: float | None
    steps: int


class _Batch(NamedTuple):
    hidden_BTH: Tensor
    """What the first block receives."""
    labels_T: Tensor
    """Of all sequences one after the other; -100 where a sequence ends."""
    teacher_TH: Tensor | None
    predictions: int
    places_A: Tensor | None = None
    """Of all sequences one after the other, the positions that labels and teacher are of; none where they
    are of all."""
    positions_BT: Tensor | None = None
    """Of packed samples."""

    def copied(self) -> _Batch:
        """The same in memory of its own."""
        teacher = None if self.teacher_TH is None else self.teacher_TH.clone()
        return _Batch(self.hidden_BTH.clone(), self.labels_T.clone(), teacher, self.predictions)

    def take(self, other: _Batch) -> None:
        """Hold what ``other`` does, in the same memory as before."""
        self.hidden_BTH.copy_(other.hidden_BTH)
        self.labels_T.copy_(other.labels_T)
        if self.teacher_TH is not None and other.teacher_TH is not None:
            self.teacher_TH.copy_(other.teacher_TH)


Result = tuple[Tensor, tuple[Tensor, ...]]
"""Loss and gradients of a micro-batch."""


class Network(Method):
    """All blocks together, measured by what they predict."""

    def __init__(
        self,
        lm: CausalLM,
        blocks: list[nn.Module],
        data: NetworkData,
        dtype: torch.dtype,
        *,
        recompute: bool = True,
        text_weight: float = 0.0,
    ) -> None:
        """``blocks`` are on the device; ``recompute`` computes each block's activations again in the backward
        pass instead of keeping them; ``text_weight`` adds cross-entropy to the divergence from a teacher."""
        self.lm, self.blocks, self.data, self.dtype = lm, blocks, data, dtype
        self.recompute = recompute
        self.poll: Callable[[], None] = lambda: None
        self.head = HeadLoss(lm, text_weight)
        self._train_forward: Callable[..., Tensor] = block_forward
        """A block's forward pass in the steps; compiled where that pays. Validations stay plain."""
        self._told: Callable[[str], None] | None = None
        """Is told why micro-steps cannot be recorded; none where nobody wants them recorded."""

    def hasten(self, progress: Progress, where: str, *, compiles: bool, records: bool) -> None:
        """Have micro-steps be compiled forms, and have them recorded, where that is wanted; what cannot be
        is said and stays as it is."""
        if compiles:
            self._compile(progress, where)
        if records:
            self._record(progress, where)

    def _compile(self, progress: Progress, where: str) -> None:
        """The blocks' steps and the losses."""

        def slower(what: str) -> Callable[[str], None]:
            return lambda why: progress.warning(
                "compile",
                f"{where}: steps are slower, {what} cannot be compiled: {why}",
                hint=SWITCH_HINT,
            )

        answers = self.data.answers
        if answers is None or answers.packed:
            self._train_forward = Compiled(
                block_forward, expect_silence=progress.expect_silence, on_failure=slower("blocks")
            )
        if answers is not None:
            return  # there are more or fewer of them each time, and a compiled form is of one size
        self.head.compile(expect_silence=progress.expect_silence, on_failure=slower("losses"))

    def _record(self, progress: Progress, where: str) -> None:
        """A micro-step on a GPU, which is replayed, with the loss by kernels unless it is compiled.
        Micro-steps on answers are of another shape each time, and are not recorded."""
        if self.data.answers is not None:
            return
        self._told = lambda why: progress.warning(
            "compile", f"{where}: steps are slower, they cannot be recorded: {why}", hint=SWITCH_HINT
        )
        if self.head.compiled:
            return
        try:
            self.head.take_kernel(self.lm.dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            why = str(error).strip()[:200] or type(error).__name__
            progress.warning(
                "compile", f"{where}: steps are slower, the loss has no kernel here: {why}", hint=SWITCH_HINT
            )

    # Forward and backward

    @property
    def leaves(self) -> list[Tensor]:
        """What a micro-step differentiates by, in the order of its gradients."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def stepper(self, settings: Settings) -> Stepper:
        stepper = self.make_stepper(settings)
        self._scale = stepper.scale
        share = min(settings.batch_size, self.data.train) // settings.world.size
        self._begin(settings.micro_batch, share)
        return stepper

    def make_stepper(self, settings: Settings) -> Stepper:
        """The optimizer, new."""
        return super().stepper(settings)

    def _begin(self, micro_batch: int, share: int) -> None:
        """Micro-batches of the usual size have fixed places from their first on; what was recorded is
        void."""
        count = min(micro_batch, share)
        self._share, self._usual = share, (count, count / share)
        self._fixed: _Batch | None = None
        self._graph = Graphed(self._fixed_step, self.lm.device, self._told or (lambda why: None))

    def _fixed_step(self) -> Result:
        assert self._fixed is not None
        return self._differentiate(self._fixed, self._usual[1])

    def hidden(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Last hidden states (before the final norm) of what the first block receives, both ``[B, T, H]``;
        ``positions`` are those of packed samples."""
        if not torch.is_grad_enabled():
            for index, block in enumerate(self.blocks):
                hidden = self.lm.run_block(block, index, hidden, positions_BT=positions)
            return hidden
        # So that the first block is compiled like the others.
        hidden = hidden.detach().requires_grad_(self._train_forward is not block_forward)
        batch, length = hidden.shape[:2]
        for index, block in enumerate(self.blocks):
            arguments = self.lm.block_kwargs(index, batch, length, hidden.dtype, positions)
            if self.recompute:
                # Nothing in a block is random, and asking a GPU for its generator's state waits for it.
                hidden = recomputed(
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

    @property
    def lengths(self) -> Tensor | None:
        answers = self.data.answers
        return None if answers is None or answers.packed else answers.lengths_N[: self.data.train]

    def weigh(self, rows: Tensor) -> int:
        answers = self.data.answers
        return len(rows) if answers is None else int(answers.counts_N[rows].sum())

    def _answers_of(self, rows: Tensor, answers: Answers) -> _Batch:
        """What is read, and the answers in it, which are to be predicted."""
        length = answers.longest(rows)
        tokens = self.data.tokens[rows, :length]
        predicts = answers.predicts_NT[rows, :length]
        # The window's last position predicts nothing, so there is a token behind each.
        labels = tokens.roll(-1, 1)[predicts]
        positions = None if answers.positions_NT is None else answers.positions_NT[rows]
        places = to_device(predicts.flatten().nonzero()[:, 0], self.lm.device)
        hidden = self.lm.embed(to_device(tokens, self.lm.device), positions).to(self.dtype)
        teacher = None
        if self.data.teacher is not None:
            teacher = self.data.teacher.read(rows)[:, :length].flatten(0, 1)[places]
        labels = to_device(labels, self.lm.device)
        return _Batch(hidden, labels, teacher, len(labels), places, positions)

    def batch(self, rows: Tensor) -> _Batch:
        """What is read, and what is to be predicted."""
        if self.data.answers is not None:
            return self._answers_of(rows, self.data.answers)
        tokens = self.data.tokens[rows]
        labels = torch.full_like(tokens, NO_LABEL)
        labels[:, :-1] = tokens[:, 1:]
        tokens, labels = to_device(tokens, self.lm.device), to_device(labels, self.lm.device).flatten()
        hidden = self.lm.embed(tokens).to(self.dtype)
        if self.data.teacher is None:
            return _Batch(hidden, labels, None, tokens.numel() - len(rows))
        return _Batch(hidden, labels, self.data.teacher.read(rows).flatten(0, 1), tokens.numel())

    def micro_step(self, rows: Tensor, weight: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
        batch = self.batch(rows)
        if self._told is None or (len(rows), weight) != self._usual:
            loss, gradients = self._differentiate(batch, weight)
            self.add(gradients, weight, fixed=False)
        elif self._fixed is None:
            self._fixed = batch.copied()
            loss, gradients = self._fixed_step()
            self.add(gradients, weight, fixed=False)
        else:
            self._fixed.take(batch)
            loss, gradients = self._graph()
            self.add(gradients, weight, fixed=self._graph.recorded)
        return loss

    def _differentiate(self, batch: _Batch, weight: float) -> Result:
        with torch.enable_grad():
            hidden_BTH = self.hidden(batch.hidden_BTH, batch.positions_BT)
        # Every position is predicted from its own hidden state alone: the batch is one row of tokens.
        flat_TH, places_A = hidden_BTH.detach().flatten(0, 1), batch.places_A
        loss, gradient_TH = self.head.gradient(
            flat_TH if places_A is None else flat_TH[places_A],
            batch.labels_T,
            batch.teacher_TH,
            weight / batch.predictions,
            self._scale,
        )
        if places_A is not None:
            gradient_TH = torch.zeros_like(flat_TH).index_copy_(0, places_A, gradient_TH)
        return loss, torch.autograd.grad(hidden_BTH, self.leaves, gradient_TH.view_as(hidden_BTH))

    def add(self, gradients: tuple[Tensor, ...], weight: float, *, fixed: bool) -> None:
        """Add a micro-batch's gradients, whose part of the batch is ``weight``, to those before it; ``fixed``
        ones lie where the next ones will."""
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            if leaf.grad is not None:
                leaf.grad += gradient
            else:
                leaf.grad = gradient.clone() if fixed and weight < 1 else gradient

    def upcoming(self, rows: Tensor) -> None:
        if self.data.teacher is not None:
            self.data.teacher.expect(rows)

    def save_memory(self) -> str:
        if self.recompute:
            return ""
        self.recompute = True
        self._begin(self._usual[0], self._share)
        return "recomputing activations"

    def memory_is_short(self, micro_batch: int) -> None:
        self._begin(micro_batch, self._share)

    @torch.no_grad()
    def validate(self, micro_batch: int) -> float | None:
        rows = self._validation_rows()
        if not len(rows):
            return None
        total = torch.zeros((), device=self.lm.device)
        parts = rows.split(micro_batch)
        for part, share in zip(parts, self.shares(parts), strict=True):
            self.poll()
            batch = self.batch(part)
            flat_TH = self.hidden(batch.hidden_BTH, batch.positions_BT).flatten(0, 1)
            flat_TH = flat_TH if batch.places_A is None else flat_TH[batch.places_A]
            loss = self.head.value(flat_TH, batch.labels_T, batch.teacher_TH)
            total += loss * (share / batch.predictions)
        return total.item()

    def validated(self) -> int:
        return self.weigh(self._validation_rows())

    def _validation_rows(self) -> Tensor:
        return self.data.world.own(torch.arange(self.data.train, self.data.tokens.shape[0]))


class NetworkSection(TrainingSection, Protocol):
    """The fields of a section whose stage trains the whole network."""

    @property
    def micro_batch_size(self) -> int: ...
    @property
    def warmup_fraction(self) -> float: ...


def network_settings(
    config: NetworkSection,
    device: torch.device,
    *,
    seed: int,
    dtype: torch.dtype,
    where: str,
    world: World,
    betas: tuple[float, float] = BETAS,
    schedule: Schedule = "cosine",
) -> Settings:
    """How a stage of the whole network is trained, as its section of the configuration says."""
    return Settings(
        epochs=config.epochs,
        batch_size=config.batch_size,
        micro_batch=config.micro_batch_size or config.batch_size,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        lr_final_fraction=config.lr_final_fraction,
        patience=config.patience,
        seed=seed,
        device=device,
        dtype=dtype,
        where=where,
        tokens_per_sequence=config.sequence_length,
        warmup_fraction=config.warmup_fraction,
        betas=betas,
        schedule=schedule,
        world=world,
    )


def train_network(
    network: Network,
    settings: Settings,
    progress: Progress,
    snapshot: Snapshot | None = None,
    keeper: Keeper | None = None,
) -> NetworkResult:
    """Train what ``network`` trains, in place; ``snapshot`` is the state to continue from, ``keeper`` keeps
    such states.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    training = Training(network, network.data.train, settings, progress, snapshot, keeper)
    network.poll = training.boundary
    training.run()
    position, best = training.position, training.best.val_loss
    if position.initial_val is not None and best is None:
        raise NonFiniteError(
            f"the validation loss is not finite after {position.steps_done} steps",
            where=settings.where,
            hint=NON_FINITE_HINT,
        )
    return NetworkResult(position.initial_val, best, position.steps_done)
