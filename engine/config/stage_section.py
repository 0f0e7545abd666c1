"""What the sections of stages have in common: whether the stage is made, on the grid it is given, and for one
that trains, how much it sees and how its learning rate runs.

A stage's section is called like the stage (:mod:`engine.config.stages`).
"""

from __future__ import annotations

from typing import Protocol, Self, TypeVar

from engine.config import checks
from engine.config.base import Section
from engine.config.grid import GridConfig
from engine.errors import UsageError

T = TypeVar("T", bound=str)
NO_ZERO_POINTS = "a grid whose zero points are fixed has none to train"


class StageSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section whose stage is made on the grid of the run. A field ``enabled`` says whether it is made."""

    def check_on(self, grid: GridConfig, name: str) -> None:
        """Like :meth:`check`, with what the grid forbids."""
        self.check(name)

    def resolved(self, grid: GridConfig) -> Self:
        """The section with every value that was left out derived from the grid and from its other values."""
        return self


class NetworkSection(StageSection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section whose stage trains the whole network: it has the fields of :class:`NetworkTraining`."""

    @classmethod
    def decides(cls, field: str) -> bool:
        return field not in ("micro_batch_size", "activation_checkpointing")


class TrainingSection(Protocol):
    """The fields of a section whose stage trains on sequences."""

    @property
    def enabled(self) -> bool: ...
    @property
    def sequences(self) -> int: ...
    @property
    def val_sequences(self) -> int: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def lr_final_fraction(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def grad_clip(self) -> float: ...
    @property
    def patience(self) -> int: ...


class NetworkTraining(TrainingSection, Protocol):
    """The fields of one whose stage trains the whole network."""

    @property
    def micro_batch_size(self) -> int: ...
    @property
    def text_weight(self) -> float: ...
    @property
    def warmup_fraction(self) -> float: ...


def check_network(name: str, training: NetworkTraining, *rates: str) -> None:
    """What trainings of the whole network have in common; ``rates`` are the fields of learning rates."""
    check_sequences(name, training)
    check_micro_batch(name, training.micro_batch_size, training.batch_size)
    checks.between(f"{name}.text_weight", training.text_weight, 0.0, 10.0)
    for rate in rates:
        check_learning_rate(f"{name}.{rate}", getattr(training, rate))
    checks.between(f"{name}.warmup_fraction", training.warmup_fraction, 0.0, 1.0)
    check_schedule(name, training)


def check_sequences(name: str, training: TrainingSection) -> None:
    """How much text is seen, and in which portions."""
    checks.count(f"{name}.sequences", training.sequences)
    checks.count(f"{name}.val_sequences", training.val_sequences, least=0)
    # The last token of a sequence has no next one: with fewer than two there is nothing to predict.
    checks.count(f"{name}.sequence_length", training.sequence_length, least=2)
    checks.count(f"{name}.batch_size", training.batch_size)
    checks.count(f"{name}.epochs", training.epochs)
    if training.enabled and training.batch_size > training.sequences:
        raise UsageError(
            f"{training.batch_size} is more than {name}.sequences = {training.sequences}",
            where=f"{name}.batch_size",
            hint=f"at most {training.sequences}",
        )


def check_micro_batch(name: str, micro_batch: int, batch: int) -> None:
    """Sequences of a forward and backward pass: 0, which the plan decides, or a divisor of the batch."""
    checks.count(f"{name}.micro_batch_size", micro_batch, least=0)
    if micro_batch and batch % micro_batch:
        divisors = [n for n in range(1, min(batch, 1024) + 1) if batch % n == 0]
        raise UsageError(
            f"{micro_batch} does not divide {name}.batch_size = {batch}",
            where=f"{name}.micro_batch_size",
            hint=f"one of {checks.listed(divisors)}",
        )


def check_schedule(name: str, training: TrainingSection) -> None:
    """How the learning rate falls, what holds a step back, and what ends the training early."""
    checks.between(f"{name}.lr_final_fraction", training.lr_final_fraction, 0.0, 1.0)
    checks.between(f"{name}.weight_decay", training.weight_decay, 0.0, 1.0)
    checks.not_negative(f"{name}.grad_clip", training.grad_clip, hint="0 turns clipping off")
    checks.count(f"{name}.patience", training.patience, least=0)
    if training.enabled and training.patience and not training.val_sequences:
        raise UsageError(
            f"early stopping needs a validation loss, and {name}.val_sequences is 0",
            where=f"{name}.patience",
            hint=f"{name}.patience = 0, or {name}.val_sequences = 16",
        )


def check_learning_rate(name: str, value: float | None) -> None:
    """None, which is derived, or above 0."""
    if value is None:
        return
    checks.finite(name, value)
    if value <= 0:
        raise UsageError(
            f"cannot be {value:g}", where=name, hint="above 0; what is not to move is left out of `train`"
        )


def trainable(train: tuple[T, ...], grid: GridConfig) -> tuple[T, ...]:
    """What of ``train`` there is to train on a grid: zero points that it fixes are none."""
    return tuple(what for what in train if not (grid.fixes_zero_points and what == "zero_points"))


def check_trained(name: str, given: tuple[str, ...], effective: tuple[str, ...], *, enabled: bool) -> None:
    """What the field ``name`` says to train: each once, and something of it must be on the grid."""
    checks.unique(name, given)
    if enabled and not effective:
        stage = name.split(".", 1)[0]
        reason = NO_ZERO_POINTS if given else "trains nothing"
        raise UsageError(reason, where=name, hint=f"name what to train, or {stage}.enabled = false")
