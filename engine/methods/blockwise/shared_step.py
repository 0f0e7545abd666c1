"""One step of several ranks, as a row of portions that overtake each other.

    reduce_scatter of a portion's gradients | AdamW of this rank's part, its integers | all_gather | W^ of all

While one portion's gradients are added up between the GPUs, the GPU itself steps those before it, whose
integers follow as soon as there is room on the link. So of a 7B block on four H100s what shows of all this is
little more than the first column: its 0.4 GB of gradients take 0.9 ms, AdamW and the quantizer beside them
0.6, and one after the other all would be 1.7 (:mod:`engine.plan.ranks` reckons with it).

That works because whether a step is applied at all is known before the first portion comes: it follows from
the gradients that each rank has itself, which are finite or not before they are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from engine.gpu.recorded import Graphed
from engine.quant.quant_step import QuantStep
from engine.quant.shard_kernel import Message, Part
from engine.training.sharded import LARGE_BYTES, ShardedGradients
from engine.training.world import Wait, World


class Portion:
    """Some linears: their whole ``quantized`` weights, and of this rank's part of each the ``kernel`` that
    steps it, the ``part`` that the others are told, and room for partial sums of ``squares``."""

    def __init__(
        self,
        world: World,
        quantized: Sequence[Tensor],
        kernels: Sequence[QuantStep],
        parts: Sequence[Part],
        squares: Sequence[Tensor],
        controls: Tensor,
        on_failure: Callable[[str], None],
    ) -> None:
        self._world, self._controls = world, controls
        self.kernels, self._squares = kernels, squares
        device = controls.device
        self._gradients = ShardedGradients(world, quantized, device)
        self._message = Message(parts, world.rank, world.size)
        self._wait: Wait | None = None
        self._stepping = Graphed(self._step, device, on_failure)
        self._reading = Graphed(self._message.read, device, on_failure)

    def add(self, gradients: Sequence[Tensor | None], part: float | None) -> None:
        """Begin to add up what came of this rank's ``part`` of the batch (:class:`ShardedGradients`)."""
        self._wait = self._gradients(gradients, part)

    def step(self, *, recorded: bool) -> None:
        """Once that is done, step this rank's part, and begin to tell the others."""
        assert self._wait is not None
        self._wait()
        self._stepping() if recorded else self._step()
        self._wait = self._world.join_parts(self._message.bytes)

    def _step(self) -> None:
        for kernel, gradient, squares in zip(self.kernels, self._gradients.parts, self._squares, strict=True):
            kernel.apply(gradient, self._controls, squares)
        self._message.write()

    def read(self, *, recorded: bool) -> None:
        """Once the others have told theirs, fill in the quantized weights."""
        assert self._wait is not None
        self._wait()
        self._wait = None
        self._reading() if recorded else self._message.read()

    def requantize(self) -> None:
        """The quantized weights of the parameters as they are now."""
        for kernel, squares in zip(self.kernels, self._squares, strict=True):
            kernel.requantize(self._controls, squares)
        self._message.write()
        self._world.join_parts(self._message.bytes)()
        self._message.read()

    def forget_graph(self) -> None:
        self._stepping.forget()
        self._reading.forget()


def portions(sizes: Iterable[int]) -> list[list[int]]:
    """Which tensors of so many bytes go together: each as many as are worth a message, in their order."""
    found: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not found or size >= LARGE_BYTES or room >= LARGE_BYTES:
            found.append([])
            room = 0
        found[-1].append(index)
        room += size
    return found


def squares_of(gradients: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Sum of squares of all numbers: finite only if each is; float32."""
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(found, 2.0, dtype=torch.float32)
    return torch.stack(norms).square().sum()
