"""Gradients of all ranks as those of one batch, in one flat buffer of each type.

A rank's gradients are the mean over its own sequences. Each counts by its part of the batch, and the sum over
the ranks is what one process would have got from all of them, up to the rounding of sums in another order.
The loss goes along, so that every rank judges a step by the same numbers.

The buffers lie at the same addresses from the first step to the last: a step that reads them can be recorded
(:mod:`engine.gpu.recorded`), however the gradients themselves came about.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.training.world import World

ALIGNMENT = 128
"""Numbers; kernels read whole vectors."""


class Averaged:
    """Room for the gradients of tensors ``like`` these, on their device."""

    def __init__(self, world: World, like: Sequence[Tensor], device: torch.device) -> None:
        self._world = world
        sizes: dict[torch.dtype, int] = {torch.float32: ALIGNMENT}  # which begins with the loss
        places = []
        for tensor in like:
            start = sizes.get(tensor.dtype, 0)
            places.append(start)
            sizes[tensor.dtype] = start + -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
        self._buffers = {
            dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()
        }
        self._loss = self._buffers[torch.float32][0]
        self.gradients = [
            self._buffers[tensor.dtype][start : start + tensor.numel()].view(tensor.shape)
            for tensor, start in zip(like, places, strict=True)
        ]
        """As they are after a call: of all ranks."""

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor | None], loss: Tensor, part: float | None) -> Tensor:
        """The mean loss of all ranks, and in ``self.gradients`` its gradients. ``part`` is this rank's of the
        batch, none where all ranks have as much; a gradient that it has not counts as zero."""
        own = [(view, g) for view, g in zip(self.gradients, gradients, strict=True) if g is not None]
        if part == 0 or len(own) < len(self.gradients):
            for buffer in self._buffers.values():
                buffer.zero_()
        if part != 0:
            if own:
                torch._foreach_copy_([view for view, _ in own], [gradient for _, gradient in own])
            self._loss.copy_(loss)
        for buffer in self._buffers.values():
            if part:
                buffer.mul_(part)
            self._world.add_(buffer, mean=part is None)
        return self._loss.clone()
