"""Which sequences make up which optimizer step: a pure function of the seed.

The order of epoch *e* is a permutation seeded by (seed, e), so position *n* can be computed without
having visited the positions before it: resuming is arithmetic, not replay. One batch is the *effective*
batch of an optimizer step.

With several ranks each has the sequences of its own, ``i mod world_size == rank``, and a batch has to have as
many of each rank. So sequence ``i`` belongs to stratum ``i mod 8``, each stratum has an order of its own, and
a batch takes the same number out of each: then 1, 2, 4 and 8 ranks see the same batches. A batch that 8 does
not divide has fewer strata (:func:`strata_of`), one that has no divisor in common with it has one order of
all (``strata=0``).

A process alone once had one order of all, whatever its batch; a training of that time goes on in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import IdentityError

GROUPED_BATCHES = 50
"""Batches among which sequences of like length are sought."""
STRATA = 8
"""Among which the sequences are dealt out where several ranks train."""


def strata_of(batch_size: int, world_size: int) -> int:
    """Into how many strata sequences fall, of which a batch takes the same number each; 0 for one order of
    all. It is the same for as many numbers of ranks as can be."""
    common = math.gcd(STRATA, batch_size)
    strata = world_size if common % world_size else common
    return strata if strata > 1 else 0


def serves(strata: int, batch_size: int, world_size: int) -> bool:
    """Whether so many ranks can take batches of these strata, as many of a batch each; a process alone can
    also take those of one order of all."""
    if not strata:
        return world_size == 1
    return strata > 0 and batch_size % strata == 0 and strata % world_size == 0


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
        strata: int | None = None,
    ) -> None:
        """``lengths`` of the sequences make batches of sequences of like length; ``strata`` is how many there
        are (:func:`strata_of` where it is not given).

        Of like length a process alone finds more among all of them: with strata the padding takes a seventh
        to a fifth more. Then, and only then, its batches are other ones than those of several ranks."""
        if count < 1 or batch_size < 1 or epochs < 0:
            raise ValueError(f"{count} sequences in batches of {batch_size} for {epochs} epochs")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if batch_size % world_size:
            raise ValueError(f"the effective batch of {batch_size} does not divide over {world_size} ranks")
        if strata is None:
            strata = 0 if lengths is not None and world_size == 1 else strata_of(batch_size, world_size)
        if not serves(strata, batch_size, world_size):
            raise ValueError(f"{strata} strata for batches of {batch_size} over {world_size} ranks")
        self.strata = strata
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
        if self.strata:
            return self._stratified(generator)
        order = torch.randperm(self.count, generator=generator)
        return order if self._lengths is None else self._grouped(order, self._lengths, generator)

    def _stratified(self, generator: torch.Generator) -> Tensor:
        """Batches one after the other, each with as many of every stratum; the last one with what is left."""
        each = self.batch_size // self.strata
        orders = []
        for stratum in range(min(self.strata, self.count)):
            own = torch.arange(stratum, self.count, self.strata)
            order = own[torch.randperm(len(own), generator=generator)]
            if self._lengths is not None:
                order = _sorted_within(order, self._lengths, GROUPED_BATCHES * each)
            orders.append(order.split(each))
        batches = [
            torch.cat([order[step] for order in orders if step < len(order)])
            for step in range(-(-self.count // self.batch_size))
        ]
        return torch.cat(batches if self._lengths is None else _mixed(batches, self.batch_size, generator))

    def _grouped(self, order: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        """The order with sequences of like length in a batch: sorted within large parts, so that the company
        of a sequence is another each time, and the batches mixed. A smaller batch stays the last one."""
        ordered = _sorted_within(order, lengths, GROUPED_BATCHES * self.batch_size)
        return torch.cat(_mixed(list(ordered.split(self.batch_size)), self.batch_size, generator))

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

    def whole(self, step: int) -> Tensor:
        """The sequences of all ranks that make up a step."""
        return self._whole(self.order(step // self.steps_per_epoch), step)

    def _share(self, order: Tensor, step: int) -> Tensor:
        whole = self._whole(order, step)
        return whole.clone() if self.world_size == 1 else whole[whole % self.world_size == self.rank]

    def _whole(self, order: Tensor, step: int) -> Tensor:
        first = step % self.steps_per_epoch * self.batch_size
        return order[first : first + self.batch_size]

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
            **({"strata": self.strata} if self.strata else {}),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where another sampler of the same settings stood, in its strata where these serve."""
        strata = int(state.get("strata", 0))
        if serves(strata, self.batch_size, self.world_size):
            self.strata, self._order = strata, None
        for name, value in {**self.state_dict(), "strata": self.strata}.items():
            there = strata if name == "strata" else state.get(name)
            if name != "step" and there != value:
                raise IdentityError(
                    f"the saved order has {name} = {there}, this run has {value}",
                    where="batch sampler",
                )
        self.seek(int(state["step"]))


def _sorted_within(order: Tensor, lengths: Tensor, part: int) -> Tensor:
    """The longest first within parts of so many."""
    # Stable, so that equal lengths stay in the order that was drawn.
    parts = order.split(part)
    return torch.cat([one[lengths[one].argsort(descending=True, stable=True)] for one in parts])


def _mixed(batches: list[Tensor], size: int, generator: torch.Generator) -> list[Tensor]:
    """Batches in another order; one smaller than ``size`` stays the last."""
    rest = [batches.pop()] if len(batches[-1]) < size else []
    mixed = torch.randperm(len(batches), generator=generator).tolist()
    return [*(batches[index] for index in mixed), *rest]
