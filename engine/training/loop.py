"""The loop that every training shares: epochs, validation, the best state, rollbacks; and all of it as a
snapshot from which it continues exactly.

A method brings what it minimises (:class:`Method`); everything that a step depends on is here:

* the parameters and AdamW's moments (:mod:`engine.training.stepper`), and where they validated best
  (:mod:`engine.training.best_state`);
* the position in the data (:mod:`engine.data.sampler`), from which order and learning rate follow;
* how many sequences pass at a time, how often the training was restarted, how long it has not improved.

So a snapshot after step *n* followed by the rest gives the same bits as never having stopped. Snapshots are
taken between two steps, or during a validation, which changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.data.sampler import BatchSampler
from engine.errors import NonFiniteError
from engine.training.best_state import BestState
from engine.training.progress import Keeper, Progress
from engine.training.schedule import Schedule, rate_factor
from engine.training.snapshot import Snapshot
from engine.training.stepper import BETAS, Diverged, ParameterGroup, Stepper
from engine.training.waiting import Waiting
from engine.training.world import ALONE, World

MAX_ROLLBACKS = 2
NON_FINITE_HINT = (
    'check the model\'s weights, lower the learning rates, or use compute_dtype = "bfloat16" or "float32"'
)
OTHERS_HINT = "another process may be using the GPU; this run is only slower for it"
"""For warnings that memory did not suffice."""
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a method is trained."""

    epochs: int
    batch_size: int
    micro_batch: int
    """Sequences that pass at a time; halved when the GPU's memory does not suffice."""
    weight_decay: float
    grad_clip: float
    lr_final_fraction: float
    patience: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    where: str
    """For messages: ``block 3``."""
    tokens_per_sequence: int
    warmup_fraction: float = 0.0
    betas: tuple[float, float] = BETAS
    """AdamW's rates of forgetting."""
    schedule: Schedule = "cosine"
    """How the learning rate falls."""
    world: World = ALONE


class Method:
    """What is trained, and on what."""

    groups: list[ParameterGroup]

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each training sequence, where batches are to be of sequences of like length."""
        return None

    def weigh(self, rows: Tensor) -> int:
        """How much sequences count in a mean: by their number."""
        return len(rows)

    def shares(self, parts: Sequence[Tensor]) -> list[float]:
        """What part of a batch's mean loss each of its micro-batches is; together they are one."""
        weights = [self.weigh(part) for part in parts]
        return [weight / sum(weights) for weight in weights]

    def stepper(self, settings: Settings) -> Stepper:
        """The optimizer, new."""
        return Stepper(
            self.groups,
            weight_decay=settings.weight_decay,
            grad_clip=settings.grad_clip,
            device=settings.device,
            dtype=settings.dtype,
            betas=settings.betas,
            world=settings.world,
        )

    def micro_step(self, rows: Tensor, weight: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
        """Forward and backward of ``rows`` (sequences); their mean loss times ``weight``, detached.

        What is sent backward is ``scale(loss)``.
        """
        raise NotImplementedError

    def upcoming(self, rows: Tensor) -> None:
        """The next micro-batch, as far as one can tell; told right after a :meth:`micro_step`."""

    def save_memory(self) -> str:
        """Do with less memory from now on, at the cost of time; what it does for that, empty if nothing."""
        return ""

    def memory_is_short(self, micro_batch: int) -> None:
        """From now on only ``micro_batch`` sequences pass at a time."""

    def project(self) -> None:
        """Bring the parameters back into their domain after a step."""
        raise NotImplementedError

    def refresh(self) -> None:
        """The parameters have got other values than a step gave them."""

    def validate(self, micro_batch: int) -> float | None:
        """Mean loss over the validation sequences that lie here, so many at a time; none without any."""
        raise NotImplementedError

    def validated(self) -> int:
        """How much these count beside those of other ranks."""
        raise NotImplementedError


@dataclass
class Position:
    """How far a training is; the data's position is the sampler's."""

    started: bool = False
    epochs_done: int = 0
    stale: int = 0
    """Epochs in a row that did not improve."""
    restarts: int = 0
    steps_done: int = 0
    """Of all restarts together."""
    micro_batch: int = 1
    initial_val: float | None = None
    noted: dict[str, Any] = field(default_factory=dict)
    """Values that the method wants to find again."""


class Training:
    """One method's training, from the parameters' present values to the best validated ones."""

    def __init__(
        self,
        method: Method,
        train: int,
        settings: Settings,
        progress: Progress,
        snapshot: Snapshot | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        """``train`` sequences are trained on; ``snapshot`` is where to continue, and is used up. Without a
        ``keeper`` a stop loses what was trained."""
        self.method, self.settings, self.progress, self.keeper = method, settings, progress, keeper
        self.world = settings.world
        parameters = [p for group in method.groups for p in group.parameters]
        self.world.alike(parameters)
        self.best = BestState(parameters)
        self.sampler = BatchSampler(
            train,
            settings.batch_size,
            settings.epochs,
            settings.seed,
            self.world.rank,
            self.world.size,
            lengths=method.lengths,
        )
        self.position = Position(micro_batch=self._most_at_a_time())
        self.loss = torch.zeros((), device=settings.device)
        self.stepper = self.method.stepper(self.settings)
        self._steps_here = 0
        self._waiting = Waiting(self.world, settings.device)
        self._keeps = False
        """Whether all ranks have agreed that the state at the coming boundary is kept, and is whole."""
        if snapshot is not None:
            self.load_state_dict(snapshot)
            snapshot.tensors.clear()  # gigabytes, of which the next checkpoint will want as many

    # The loop

    def run(self) -> None:
        """Train to the end; leaves the best validated values in place.

        Raises:
            NonFiniteError: when it diverges a third time; names where and the step.
            StopRequested: at a step boundary, after a stop was asked for.
        """
        while True:
            try:
                return self._train()
            except Diverged as diverged:
                self._restart(diverged)

    def _train(self) -> None:
        position, settings = self.position, self.settings
        if not position.started:
            position.initial_val = self._validate()
            self.best.keep_if_best(position.initial_val, at_start=True)
            position.started = True
        while position.epochs_done < settings.epochs and not self._patience_is_over():
            for _, step, rows in self.sampler.rest_of_epoch(position.epochs_done):
                self._step(step, rows)
            self._end_of_epoch()
        self.best.load_best()
        self.method.refresh()

    def _validate(self) -> float | None:
        """Over the sequences of all ranks."""
        own = self.with_memory(self.method.validate)
        return self.world.mean(own, self.method.validated()) if self.world.several else own

    def _patience_is_over(self) -> bool:
        return 0 < self.settings.patience <= self.position.stale

    def _step(self, step: int, rows: Tensor) -> None:
        settings = self.settings
        warmup = math.ceil(settings.warmup_fraction * self.sampler.steps)
        factor = rate_factor(settings.schedule, step, self.sampler.steps, settings.lr_final_fraction, warmup)
        self.stepper.set_lr(self.lr_factor * factor)
        loss = self.with_memory(lambda micro_batch: self._accumulate(rows, micro_batch))
        self._waiting.begin()
        micro_batch, due = self._agreed()
        self.loss = self.stepper.average(loss, self._part(step))
        self._waiting.end()
        self.stepper.step(self.loss)
        self.method.project()
        self.position.steps_done += 1
        self._steps_here += 1
        if micro_batch < self.position.micro_batch:
            self.position.micro_batch = micro_batch
            self.method.memory_is_short(micro_batch)
        if self.progress.due() if due is None else due:
            self.stepper.check(step)
            self._waiting.note()
            self._report(step + 1)
        if self._keeps:
            self.stepper.gather_state()
        self.boundary()
        self._keeps = False

    def _most_at_a_time(self) -> int:
        """As many sequences as are wanted, and no more than this rank has of a batch."""
        settings = self.settings
        share = settings.batch_size // self.world.size if self.world.several else settings.micro_batch
        return min(settings.micro_batch, share)

    def _agreed(self) -> tuple[int, bool | None]:
        """With how many sequences at a time every rank has memory, and whether the first one reports; what a
        process alone decides later is none."""
        own = self.position.micro_batch
        if not self.world.several:
            return own, None
        # All ranks look at what a report reads back in the same step, for that decides.
        first = self.world.rank == 0
        silent = not first or not self.progress.due()
        # Where each has a part of the state, all have to come together for it to be kept.
        asks = first and self.stepper.sharded and self.keeper is not None
        leaves_it = not (asks and self.keeper is not None and self.keeper.wants_state())
        least, silent_all, all_leave_it = self.world.least([own, int(silent), int(leaves_it)])
        self._keeps = not all_leave_it
        return least, not silent_all

    def _part(self, step: int) -> float | None:
        """How much of the step is this rank's; none where all ranks have as much."""
        if not self.world.several:
            return None
        whole, size = self.sampler.whole(step), self.world.size
        weights = [self.method.weigh(whole[whole % size == rank]) for rank in range(size)]
        return None if len({*weights}) == 1 else weights[self.world.rank] / sum(weights)

    def _accumulate(self, rows: Tensor, micro_batch: int) -> Tensor:
        loss = torch.zeros((), device=self.settings.device)
        parts = _split(rows, micro_batch)
        next_batch = self.sampler.upcoming()
        following = [*parts[1:], *([] if next_batch is None else _split(next_batch, micro_batch)[:1])]
        for part, share, after in zip_longest(parts, self.method.shares(parts), following):
            if part is not None:  # of the last batch of an epoch a rank may have nothing
                loss += self.method.micro_step(part, share, self.stepper.scale)
            if after is not None:
                self.method.upcoming(after)
        return loss

    def _end_of_epoch(self) -> None:
        """Validate and keep the best."""
        position, step = self.position, self.sampler.step
        self.stepper.check(step - 1, last=step == self.sampler.steps)
        self.stepper.gather_values()
        val = self._validate()
        improved = self.best.keep_if_best(val)
        if val is not None:
            self.progress.metric(
                step=step,
                steps=self.sampler.steps,
                epoch=position.epochs_done,
                loss=self.loss.item(),
                val_loss=val,
            )
        position.stale = 0 if improved or val is None else position.stale + 1
        position.epochs_done += 1

    def _report(self, step: int) -> None:
        settings = self.settings
        self.progress.metric(
            step=step,
            steps=self.sampler.steps,
            epoch=self.position.epochs_done,
            loss=self.loss.item(),
            grad_norm=self.stepper.grad_norm.item(),
            lr=self.stepper.lr(),
            tokens=self._steps_here * settings.batch_size * settings.tokens_per_sequence,
        )

    def boundary(self) -> None:
        """The state is one to continue from; raises StopRequested once a stop was asked for."""
        if self.keeper is None or self.world.rank:  # the first rank alone keeps anything
            self.progress.leave_if_asked()
        elif self.stepper.sharded and not self._keeps:
            self.keeper.step_boundary(None)
        else:
            self.keeper.step_boundary(self.state_dict)

    # Starting over

    @property
    def lr_factor(self) -> float:
        """Halved at each restart."""
        return 0.5**self.position.restarts

    def _restart(self, diverged: Diverged) -> None:
        """From the beginning at half the learning rate."""
        old, where = self.position, self.settings.where
        self.best.restart()
        if old.restarts == MAX_ROLLBACKS:
            raise NonFiniteError(
                f"the loss was not finite in {diverged.in_a_row} steps in a row (step {diverged.step}), "
                f"also after {MAX_ROLLBACKS} restarts at half the learning rate",
                where=where,
                hint=NON_FINITE_HINT,
            ) from None
        self.position = Position(
            restarts=old.restarts + 1,
            steps_done=old.steps_done,
            micro_batch=old.micro_batch,
            noted=old.noted,
        )
        self.sampler.seek(0)
        self.stepper = self.method.stepper(self.settings)
        self.progress.warning(
            "rollback",
            f"{where}: non-finite loss up to step {diverged.step}; "
            f"starting it again with {self.lr_factor:g} of the learning rate",
        )

    # Too little memory

    def with_memory(self, work: Callable[[int], T]) -> T:
        """``work(micro_batch)``, again while memory does not suffice: first by what the method can do about
        it, then with half as many sequences at a time.

        Whatever gradients it had added up are dropped. With one sequence the error is raised.
        """
        while True:
            try:
                return work(self.position.micro_batch)
            except torch.OutOfMemoryError:
                saving = self.method.save_memory()
                if not saving and self.position.micro_batch == 1:
                    raise
            # After the handler: its traceback holds the very tensors that have to go.
            self._save(saving) if saving else self._halve()

    def _save(self, how: str) -> None:
        self.stepper.drop_gradients()
        self._give_back()
        self.progress.warning(
            "memory",
            f"{self.settings.where}: out of memory; going on by {how}",
            hint=OTHERS_HINT,
        )

    def _give_back(self) -> None:
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()

    def _halve(self) -> None:
        position, settings = self.position, self.settings
        before, position.micro_batch = position.micro_batch, position.micro_batch // 2
        self.stepper.drop_gradients()
        self.method.memory_is_short(position.micro_batch)
        self._give_back()
        self.progress.warning(
            "micro_batch",
            f"{settings.where}: out of memory with {before} sequences at a time; going on with "
            f"{position.micro_batch} and the same batch of {settings.batch_size}",
            hint=OTHERS_HINT,
        )

    # Continuing

    def state_dict(self) -> Snapshot:
        """Everything from which :meth:`run` continues. The tensors are the live ones: copy them."""
        position = self.position
        facts = {
            "started": position.started,
            "epochs_done": position.epochs_done,
            "stale": position.stale,
            "restarts": position.restarts,
            "steps_done": position.steps_done,
            "micro_batch": position.micro_batch,
            "initial_val": position.initial_val,
            "noted": position.noted,
            "sampler": self.sampler.state_dict(),
        }
        parts = {"": Snapshot({"loss": self.loss}, facts), "step.": self.stepper.state_dict()}
        return Snapshot.join({**parts, "best.": self.best.state_dict()})

    def load_state_dict(self, snapshot: Snapshot) -> None:
        """Continue where another training of the same method and settings stood."""
        facts = dict(snapshot.facts)
        self.sampler.load_state_dict(facts["sampler"])
        self.position = Position(
            **{name: facts[name] for name in Position.__dataclass_fields__ if name in facts}
        )
        # Memory may have sufficed for fewer sequences only, and may be short by order now.
        self.position.micro_batch = min(self.position.micro_batch, self._most_at_a_time())
        self.loss = snapshot.tensors["loss"].to(self.settings.device)
        self.stepper.load_state_dict(snapshot.part("step."))
        self.best.load_state_dict(snapshot.part("best."))


def _split(rows: Tensor, micro_batch: int) -> Sequence[Tensor]:
    """In portions; none of nothing."""
    return rows.split(micro_batch) if len(rows) else ()
