"""One step of several ranks, as a row of portions that overtake each other.

    reduce_scatter of a portion's gradients | AdamW of this rank's part, its integers | all_gather | W^ of all

While one portion's gradients are added up between the GPUs, the GPU itself steps those before it, and their
integers follow between two others on the link. The first portions set out earlier still: as soon as their
gradients are there, while the backward pass is at the linears before them
(:mod:`engine.quant.announced`). So of a 7B block on four H100s little more shows of all this
than what travels: its 0.4 GB of gradients take 0.9 ms and the integers 0.15; what the GPU does beside them,
0.9, would come on top one after the other (:mod:`engine.plan.ranks` reckons with it).

That works because whether a step is applied at all is known before the first portion is stepped: it follows
from the gradients that each rank has itself, which are finite or not before they are added up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.gpu.recorded import Graphed
from engine.quant.announced import Announcements
from engine.quant.quant_step import QuantStep
from engine.quant.shard_kernel import Message, Part
from engine.training.sharded import LARGE_BYTES, ShardedGradients
from engine.training.world import Wait, World

AHEAD = 3
"""Portions whose gradients travel before the integers of the first do, and before the loss: the matrices of
an MLP, the largest and the first that a backward pass comes to."""


class QuantSteps(NamedTuple):
    """The ``steps`` of some linears, and room for the sums of squares of their gradients: all of them, and
    each step's ``parts``."""

    steps: Sequence[QuantStep]
    squares: Tensor
    parts: Sequence[Tensor]

    def apply(self, gradients: Sequence[Tensor], controls: Tensor) -> None:
        """One step of each that has a gradient: all, or none."""
        for step, gradient, squares in zip(self.steps, gradients, self.parts, strict=bool(gradients)):
            step.apply(gradient, controls, squares)

    def requantize(self, controls: Tensor) -> None:
        """The quantized weights of the parameters as they are now."""
        for step, squares in zip(self.steps, self.parts, strict=True):
            step.requantize(controls, squares)


class Portion:
    """Some linears: their whole ``quantized`` weights, and of this rank's part of each the kernel that steps
    it, and the ``part`` that the others are told. ``numbers`` are those by which their gradients are
    announced."""

    def __init__(
        self,
        world: World,
        quantized: Sequence[Tensor],
        kernels: QuantSteps,
        parts: Sequence[Part],
        numbers: Sequence[int],
        controls: Tensor,
        on_failure: Callable[[str], None],
    ) -> None:
        self.numbers = numbers
        self._world, self._controls, self._kernels = world, controls, kernels
        self.squared = torch.zeros((), device=controls.device)
        """Of the step's gradients, those of the parameters, over all ranks."""
        device = controls.device
        self._gradients = ShardedGradients(world, quantized, device)
        self._message = Message(parts, world.rank, world.size)
        self._wait: Wait | None = None
        self._stepping = Graphed(self._step, device, on_failure)
        self._reading = Graphed(self._read, device, on_failure)

    def add(
        self, gradients: Sequence[Tensor | None], part: float | None, announced: Announcements | None
    ) -> None:
        """Begin to add up what came of this rank's ``part`` of the batch (:class:`ShardedGradients`), as soon
        as it is there where that is ``announced``."""
        with beside(announced, self.numbers):
            self._wait = self._gradients(gradients, part)

    def step(self, *, recorded: bool) -> None:
        """Once that is done, step this rank's part, and begin to tell the others."""
        assert self._wait is not None
        self._wait()
        self._stepping() if recorded else self._step()
        self._wait = self._world.join_parts(self._message.bytes)

    def _step(self) -> None:
        self._kernels.apply(self._gradients.parts, self._controls)
        torch.sum(self._kernels.squares, 0, out=self._message.note)
        self._message.write()

    def read(self, *, recorded: bool) -> None:
        """Once the others have told theirs, fill in the quantized weights."""
        assert self._wait is not None
        self._wait()
        self._wait = None
        self._reading() if recorded else self._read()

    def _read(self) -> None:
        torch.sum(self._message.noted, 0, out=self.squared)
        self._message.read()

    def requantize(self) -> None:
        """The quantized weights of the parameters as they are now."""
        self._kernels.requantize(self._controls)
        self._message.note.copy_(self.squared)
        self._message.write()
        self._world.join_parts(self._message.bytes)()
        self._message.read()

    def forget_graph(self) -> None:
        self._stepping.forget()
        self._reading.forget()


def portions(sizes: Iterable[int]) -> list[list[int]]:
    """Which tensors of so many bytes go together: each as many as are worth a message. The smallest portion
    comes last, for of the last one everything shows."""
    sizes = list(sizes)
    found: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not found or size >= LARGE_BYTES or room >= LARGE_BYTES:
            found.append([])
            room = 0
        found[-1].append(index)
        room += size
    return sorted(found, key=lambda places: -sum(sizes[index] for index in places))


class Row:
    """The portions of a step. All ranks make the same one, so whether the gradients of all of them set out
    ``at_once``, or some follow others' integers, must not depend on what one rank sees."""

    def __init__(self, portions: Sequence[Portion], device: torch.device, *, at_once: bool) -> None:
        self._portions, self._device, self._at_once = portions, device, at_once
        self._upcoming: list[Callable[[], None]] = []

    def add(
        self,
        gradients: Sequence[Sequence[Tensor | None]],
        part: float | None,
        announced: Announcements | None,
    ) -> Tensor:
        """Begin to add up each portion's gradients (:meth:`Portion.add`); of the first ones at once. What
        comes back is the sum of squares of what is given."""

        def later(portion: Portion, given: Sequence[Tensor | None]) -> Callable[[], None]:
            return lambda: portion.add(given, part, announced)

        self._upcoming = [later(*pair) for pair in zip(self._portions, gradients, strict=True)]
        self._go_on(AHEAD)
        if announced is None:
            return squares_of((one for given in gradients for one in given), self._device)
        squares = []
        for portion, given in zip(self._portions, gradients, strict=True):
            with announced.beside(portion.numbers):
                squares.append(squares_of(given, self._device))
        announced.join()
        return torch.stack(squares).sum()

    def _go_on(self, count: int) -> None:
        for begin in self._upcoming[:count]:
            begin()
        del self._upcoming[:count]

    def step(self, *, recorded: bool) -> None:
        """All of them, once the controls say how."""
        if self._at_once:
            # While the first ones are stepped the last ones' gradients arrive. Their integers wait for each
            # other on the link, so what sets out behind them would wait for the stepping as well.
            self._go_on(len(self._portions))
        for number, portion in enumerate(self._portions):
            self._go_on(1)
            portion.step(recorded=recorded)
            if number:
                self._portions[number - 1].read(recorded=recorded)
        for portion in self._portions[-1:]:
            portion.read(recorded=recorded)

    def squared(self) -> Tensor:
        """Sum of squares of all gradients, over all ranks."""
        return torch.stack([portion.squared for portion in self._portions]).sum()


def beside(
    announced: Announcements | None, numbers: Sequence[int]
) -> contextlib.AbstractContextManager[None]:
    """What is begun within waits for these gradients alone, where they are announced."""
    return contextlib.nullcontext() if announced is None else announced.beside(numbers)


def squares_of(gradients: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Sum of squares of all numbers: finite only if each is; float32."""
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(found, 2.0, dtype=torch.float32)
    return torch.stack(norms).square().sum()
