"""Samples of unlike length in windows of one length.

*Packed*, several short samples share a window, and none sees another: positions begin anew with each, and
where they do is how transformers knows that what follows belongs to another sequence
(``find_packed_sequence_indices``), for full and sliding attention alike. *Apart*, each has a window of its
own, whose rest is padding behind it, which no earlier token of a causal model sees; then batches are made
of samples of like length, and cut to the longest.

Padding, and all that is no answer, is predicted by nobody.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.data.encoding import Ids

PADDING = 0
"""A token that every model has; which one does not matter."""
OPEN = 32
"""Windows that are filled at a time."""
MISFITS = 64
"""So many samples in a row that no window has room for end the filling."""
GRAIN = 64
"""Batches of samples apart are cut to a multiple of so many tokens: every other length is one more shape."""


class Sample(NamedTuple):
    """One sequence, and which of its tokens are to be learned."""

    ids: Ids
    learned: NDArray[numpy.bool_]


@dataclass(frozen=True)
class Answers:
    """What of token windows is to be learned, and which of their tokens belong together."""

    learned_NT: Tensor
    """Bool; every window has some that it can predict."""
    segments_NT: Tensor
    """Int16: the number of the sample in its window; padding counts as the last one."""
    packed: bool
    """Whether a window may hold several samples."""

    def __getitem__(self, rows: Tensor | slice) -> Answers:
        return Answers(self.learned_NT[rows], self.segments_NT[rows], self.packed)

    @functools.cached_property
    def predicts_NT(self) -> Tensor:
        """Which positions predict something: those whose next token is to be learned, and is of their own
        sample."""
        predicts = torch.zeros_like(self.learned_NT)
        same = self.segments_NT[:, 1:] == self.segments_NT[:, :-1]
        predicts[:, :-1] = self.learned_NT[:, 1:] & same
        return predicts

    @functools.cached_property
    def counts_N(self) -> Tensor:
        """Predictions of each window, at least one."""
        return self.predicts_NT.sum(1)

    @functools.cached_property
    def positions_NT(self) -> Tensor | None:
        """Place of each token in its sample; none where windows hold one, whose places are the usual ones."""
        if not self.packed:
            return None
        segments = self.segments_NT
        places = torch.arange(segments.shape[1]).expand(segments.shape)
        begins = torch.zeros_like(places)
        begins[:, 1:] = torch.where(segments[:, 1:] != segments[:, :-1], places[:, 1:], 0)
        return places - begins.cummax(1).values

    @functools.cached_property
    def lengths_N(self) -> Tensor:
        """Tokens of each window up to its padding, where it holds one sample."""
        return (self.segments_NT == 0).sum(1)

    def longest(self, rows: Tensor) -> int:
        """So many tokens hold all of these windows."""
        length = self.segments_NT.shape[1]
        if self.packed:
            return length
        return min(length, -(-int(self.lengths_N[rows].max()) // GRAIN) * GRAIN)


@dataclass
class Cut:
    """What of the samples did not fit."""

    samples: int = 0
    longer: int = 0
    """Samples that were cut, or left out."""
    empty: int = 0
    """Samples that were left out, since nothing that is learned was left of them."""
    lost: int = 0
    """Tokens that would have been learned."""
    learned: int = 0
    """Such tokens of all samples, with the lost ones."""

    def count(self, sample: Sample, length: int, *, empty: bool) -> None:
        """A sample that is in a window, as far as it has room, or left out because it is ``empty``."""
        self.samples += 1
        self.learned += int(sample.learned[1:].sum())
        self.longer += len(sample.ids) > length
        self.lost += int(sample.learned[length:].sum())
        self.empty += empty

    def words(self, corpus: str, part: str, length: int) -> list[str]:
        """The same for people: one line, or none."""
        if not self.longer and not self.empty:
            return []
        without = f"; {self.empty:,} had no answer left and were left out" if self.empty else ""
        return [
            f"{corpus}, {part}: {self.longer:,} of {self.samples:,} conversations are longer than {length} "
            f"tokens and were cut, which lost {self.lost:,} of {self.learned:,} tokens of answers{without}"
        ]


@dataclass
class Filled:
    """Windows of samples."""

    tokens_NT: Tensor
    answers: Answers
    cut: Cut
    passes: int
    """How often the samples were used."""
    tokens: int
    """Tokens of the windows that are no padding."""


def fill(
    samples: Iterable[Sample], *, windows: int, length: int, packed: bool, order: str, passes: int
) -> Filled:
    """At most so many windows of samples, which are used as long as there are fewer, up to ``passes`` times;
    ``order`` decides how they follow each other after the first time."""
    cut, kept = Cut(), list[Sample]()
    bins = _Bins(windows, length, packed)
    for sample in samples:
        part = Sample(sample.ids[:length], sample.learned[:length])
        empty = not part.learned[1:].any()
        placed = not empty and bins.add(part)
        if placed:
            kept.append(part)
        if placed or empty:
            cut.count(sample, length, empty=empty)
        if bins.done:
            break
    done = 1
    draw = random.Random(order)
    while kept and len(bins.made) < windows and done < passes:
        done += 1
        draw.shuffle(kept)
        for sample in kept:
            bins.add(sample)
            if bins.done:
                break
    answers = Answers(*bins.masks(), packed)
    return Filled(bins.tokens(), answers, cut, done, sum(length - window.room for window in bins.made))


@dataclass
class _Window:
    room: int
    samples: list[Sample] = field(default_factory=list)

    def put(self, sample: Sample) -> None:
        self.samples.append(sample)
        self.room -= len(sample.ids)


class _Bins:
    """Windows that are being filled: a sample goes into the first open one with room for it."""

    def __init__(self, most: int, length: int, packed: bool) -> None:
        self._most, self._length, self._packed = most, length, packed
        self.made: list[_Window] = []
        self._open: list[_Window] = []
        self._misfits = 0

    @property
    def done(self) -> bool:
        """Whether it is no longer worth trying to put another sample somewhere."""
        full = len(self.made) == self._most
        return full and (not self._open or self._misfits >= MISFITS)

    def add(self, sample: Sample) -> bool:
        """Put it somewhere; false where no window has room for it."""
        size = len(sample.ids)
        place = next((window for window in self._open if window.room >= size), None)
        if place is None and len(self.made) < self._most:
            place = _Window(self._length)
            self.made.append(place)
            if self._packed:
                self._open.append(place)
        if place is None:
            self._misfits += 1
        else:
            self._misfits = 0
            place.put(sample)
        if len(self._open) > OPEN:
            self._open.remove(min(self._open, key=lambda window: window.room))
        return place is not None

    def tokens(self) -> Tensor:
        """All windows, padded, int64 ``[N, T]``."""
        found = numpy.full((len(self.made), self._length), PADDING, dtype=numpy.int64)
        for row, window in zip(found, self.made, strict=True):
            ids = numpy.concatenate([sample.ids for sample in window.samples])
            row[: len(ids)] = ids
        return torch.from_numpy(found)

    def masks(self) -> tuple[Tensor, Tensor]:
        """What of them is learned, and which sample each token is of."""
        shape = (len(self.made), self._length)
        learned, segments = numpy.zeros(shape, dtype=bool), numpy.zeros(shape, dtype=numpy.int16)
        for row, window in enumerate(self.made):
            begin = 0
            for number, sample in enumerate(window.samples):
                end = begin + len(sample.ids)
                learned[row, begin:end] = sample.learned
                segments[row, begin:end] = number
                begin = end
            segments[row, begin:] = len(window.samples)
        return torch.from_numpy(learned), torch.from_numpy(segments)
