"""Which sequences make up which optimizer step: a pure function of the seed.

The order of epoch *e* is a permutation seeded by (seed, e), so position *n* can be computed without
having visited the positions before it: resuming is arithmetic, not replay. One batch is the *effective*
batch of an optimizer step; with several ranks each takes its own share of it, so that the same
sequences meet in the same step whatever the number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import IdentityError

GROUPED_BATCHES = 50
"""Batches among which sequences of like length are sought."""


class Batch(NamedTuple):
    """One optimizer step of one rank."""

    epoch: int
    step: int
    """Counted over all epochs, from 0."""
    indices: Tensor
    """int64 on the CPU; shorter than the others at the end of an epoch, possibly empty on some ranks."""


class BatchSampler:
    """Iterates over the steps from wherever it stands; ``state_dict`` is where it stands.

    A step counts as taken as soon as it is handed out, so save the state *after* the step was applied.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        epochs: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        lengths: Tensor | None = None,
    ) -> None:
        """``lengths`` of the sequences make batches of sequences of like length."""
        if count < 1 or batch_size < 1 or epochs < 0:
            raise ValueError(f"{count} sequences in batches of {batch_size} for {epochs} epochs")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if batch_size % world_size:
            raise ValueError(f"the effective batch of {batch_size} does not divide over {world_size} ranks")
        self.count = count
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self._lengths = lengths
        self.step = 0
        self._order: tuple[int, Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one may be smaller."""
        whole, rest = divmod(self.count, self.batch_size)
        return whole + (1 if rest and not (self.drop_last and whole) else 0)

    @property
    def steps(self) -> int:
        """Optimizer steps of all epochs."""
        return self.steps_per_epoch * self.epochs

    def order(self, epoch: int) -> Tensor:
        """The permutation of an epoch; the last one is kept."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._draw(epoch)
        return self._order[1]

    def _draw(self, epoch: int) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        order = torch.randperm(self.count, generator=generator)
        return order if self._lengths is None else self._grouped(order, self._lengths, generator)

    def _grouped(self, order: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        """The order with sequences of like length in a batch: sorted within large parts, so that the company
        of a sequence is another each time, and the batches mixed. A smaller batch stays the last one."""
        parts = order.split(GROUPED_BATCHES * self.batch_size)
        # Stable, so that equal lengths stay in the order that was drawn.
        ordered = torch.cat([part[lengths[part].argsort(descending=True, stable=True)] for part in parts])
        batches = list(ordered.split(self.batch_size))
        rest = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        mixed = torch.randperm(len(batches), generator=generator).tolist()
        return torch.cat([*(batches[index] for index in mixed), *rest])

    def __iter__(self) -> Iterator[Batch]:
        while self.step < self.steps:
            yield from self.rest_of_epoch(self.step // self.steps_per_epoch)

    def rest_of_epoch(self, epoch: int) -> Iterator[Batch]:
        """The steps of ``epoch`` that have not been taken yet; none when all of them have."""
        order = self.order(epoch)
        while self.step // self.steps_per_epoch == epoch:
            step = self.step
            self.step = step + 1
            yield Batch(epoch, step, self._share(order, step))

    def upcoming(self) -> Tensor | None:
        """The sequences of the next step; none where this epoch has no other."""
        if self.step == self.steps or self.step % self.steps_per_epoch == 0:
            return None
        return self._share(self.order(self.step // self.steps_per_epoch), self.step)

    def _share(self, order: Tensor, step: int) -> Tensor:
        first = step % self.steps_per_epoch * self.batch_size
        return order[first : first + self.batch_size].tensor_split(self.world_size)[self.rank].clone()

    def __len__(self) -> int:
        return self.steps

    def seek(self, step: int) -> None:
        """Continue at ``step``, e.g. 0 to start a block again."""
        if not 0 <= step <= self.steps:
            raise ValueError(f"step {step} of {self.steps}")
        self.step = step

    def state_dict(self) -> dict[str, int]:
        """The position, with everything that decides what the positions mean (but for the ranks)."""
        return {
            "step": self.step,
            "count": self.count,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "seed": self.seed,
            "drop_last": int(self.drop_last),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where another sampler of the same settings stood."""
        for name, value in self.state_dict().items():
            if name != "step" and state.get(name) != value:
                raise IdentityError(
                    f"the saved order has {name} = {state.get(name)}, this run has {value}",
                    where="batch sampler",
                )
        self.seek(int(state["step"]))
