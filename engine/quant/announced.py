"""Weights whose gradients say when they are there, in the middle of a backward pass.

A backward pass, and a compiled or recorded one above all, hands its gradients over when it has ended. The
last layers' have lain there for long by then, and could have been on their way to other GPUs meanwhile. So a
weight is handed through :func:`announced`, whose backward pass notes that the gradient has come: on a GPU by
an event of its own (:class:`Announcements`), which a recorded step records anew at each replay, and for which
another stream can wait while the step goes on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Announcements:
    """When the gradients of the weights with these numbers came last.

    One at a time listens (:meth:`listen`), for what is compiled names the numbers alone.
    """

    listening: Announcements | None = None

    def __init__(self, count: int, device: torch.device) -> None:
        self.tokens = [torch.zeros((), device=device, requires_grad=True) for _ in range(count)]
        """One for each weight, whose own gradient, 0, is what comes of the noting: a compiled backward pass
        notes only where that is asked for."""
        waits = count > 0 and device.type == "cuda"
        self._places = [0] * count
        self._events = [torch.cuda.Event(external=True) for _ in range(count if waits else 0)]
        self._aside = _side_stream(device) if waits else None

    def listen(self) -> None:
        """From now on, in the place of whoever listened before."""
        Announcements.listening = self

    def close(self) -> None:
        if Announcements.listening is self:
            Announcements.listening = None

    def come(self, number: int, gradient: Tensor) -> None:
        """The gradient is there, once the current stream has come so far."""
        self._places[number] = gradient.data_ptr()
        if self._events:
            self._events[number].record()

    def hold_for(self, gradients: Sequence[Tensor]) -> bool:
        """Whether what a backward pass has handed over is what it announced, where it lay: no copy of it,
        which would have come later."""
        announced = gradients[: len(self._places)]
        return all(one.data_ptr() == place for one, place in zip(announced, self._places, strict=True))

    @contextlib.contextmanager
    def beside(self, numbers: Iterable[int]) -> Iterator[None]:
        """What is asked of the device within begins once these gradients are there, beside what is left of
        the backward pass. On a CPU all of them are."""
        if self._aside is None:
            yield
            return
        with torch.cuda.stream(self._aside):
            for number in numbers:
                self._events[number].wait()
            yield

    def join(self) -> None:
        """Have the current stream wait for what was begun :meth:`beside` it."""
        if self._aside is not None:
            torch.cuda.current_stream(self._aside.device).wait_stream(self._aside)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all blocks: torch keeps memory apart for each stream."""
    return torch.cuda.Stream(device)


@torch.library.custom_op("eqat::gradient_is_there", mutates_args=())
def _gradient_is_there(gradient: Tensor, number: int) -> Tensor:
    if Announcements.listening is not None:
        Announcements.listening.come(number, gradient)
    return gradient.new_zeros((), dtype=torch.float32)


@_gradient_is_there.register_fake
def _(gradient: Tensor, number: int) -> Tensor:
    return gradient.new_zeros((), dtype=torch.float32)


class _Announced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, token: Tensor, number: int) -> Tensor:
        ctx.number = number
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        return gradient, torch.ops.eqat.gradient_is_there(gradient, ctx.number), None


def announced(weight: Tensor, token: Tensor, number: int) -> Tensor:
    """The same weight; when its gradient comes, whoever listens is told its number. ``token`` is the one that
    :class:`Announcements` has for it."""
    made: Tensor = _Announced.apply(weight, token, number)
    return made
