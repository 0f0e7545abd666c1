"""Parameters whose optimizer's state is shared out over the ranks (ZeRO-1, arXiv 1910.02054, section 5).

Every rank would take the same step of the same weights. Instead each takes that of its own part, an equally
long stretch of every tensor:

    1. of a gradient each rank gets the sum over all ranks of its part alone (``reduce_scatter``), which is
       half the traffic of adding up the whole;
    2. AdamW moves that part, with moments of that part: 1/N of the time and of their memory;
    3. what the next forward pass needs of it goes to all ranks (``all_gather``), the other half.

What travels in the first half is the gradient in its own dtype, summed up in it: float32 for the plain steps,
the arithmetic's 16 bits where the quantized weight is a tensor of its own. In the second half it is whatever
the method says: the plain steps hand the float32 parameters on; the fast ones integers
(:mod:`engine.quant.shard_kernel`), which are a sixteenth of that and lose nothing.

Gradients of large tensors are added up where they lie, and their values come together there. Small ones go
together through one flat buffer, both ways, for each message between GPUs takes some microseconds however
short it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.training.world import Wait, World

LARGE_BYTES = 16 << 20
"""From here on a gradient is a message of its own. Reckoned from 150 GB/s and 20 microseconds."""
ALIGNMENT = 128
"""Numbers; kernels read whole vectors."""


class ShardedGradients:
    """This rank's parts of the gradients of tensors ``like`` these, all of one dtype, in one flat buffer.

    The parts lie at the same addresses from the first step to the last, so that a step that reads them can be
    recorded (:mod:`engine.gpu.recorded`).
    """

    def __init__(self, world: World, like: Sequence[Tensor], device: torch.device) -> None:
        self._world = world
        dtype = like[0].dtype
        assert all(one.dtype == dtype for one in like), "gradients of several dtypes"
        self._dtype, self._like = dtype, list(like)
        order = sorted(range(len(like)), key=lambda index: like[index].nbytes >= LARGE_BYTES)
        self._small = [index for index in order if like[index].nbytes < LARGE_BYTES]
        starts, end = {}, 0
        for index in order:
            starts[index] = end
            end += -(-like[index].numel() // world.size // ALIGNMENT) * ALIGNMENT
        small = starts[order[len(self._small)]] if len(self._small) < len(order) else end
        self.flat = torch.zeros(end, dtype=dtype, device=device)
        """All parts; zero between them."""
        self.parts = [
            self.flat[starts[index] : starts[index] + one.numel() // world.size]
            for index, one in enumerate(like)
        ]
        """As they are after a call: of all ranks."""
        # What is sent of small ones: for each rank, what it gets.
        self._room = torch.zeros(world.size, small, dtype=dtype, device=device)
        self._places = {
            index: self._room[:, starts[index] : starts[index] + like[index].numel() // world.size]
            for index in self._small
        }
        self._small_parts = self.flat[:small]

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor | None], part: float | None) -> Wait:
        """Begin to add up, in ``self.parts``, the ``gradients``, which are the mean over this rank's ``part``
        of the batch (none: as much as each has). One that it has not counts as zero. What is given is used
        up, and stays where it is until what comes back is called."""
        world, waits = self._world, list[Wait]()
        sent: list[Tensor] = []
        for index, gradient in enumerate(gradients):
            if index in self._places:
                place = self._places[index]
                if gradient is None or part == 0:
                    place.zero_()
                else:
                    place.copy_(gradient.detach().reshape(place.shape))
        if self._small:
            if part:
                self._room.mul_(part)
            waits.append(world.add_parts(self._room, self._small_parts, mean=part is None))
        for index, gradient in enumerate(gradients):
            if index not in self._places:
                sent.append(self._sent(index, gradient, part))
                waits.append(world.add_parts(sent[-1], self.parts[index], mean=part is None))

        def wait() -> None:
            for one in waits:
                one()
            sent.clear()

        return wait

    @torch.no_grad()
    def join(self, wholes: Sequence[Tensor]) -> None:
        """Make tensors like these whole on every rank, of which each has moved its own part: large ones where
        they lie, small ones in one message, by the buffer that their gradients were sent from."""
        world, small = self._world, self._small
        waits = [world.join_parts(one) for index, one in enumerate(wholes) if index not in self._places]
        if small:
            own = [world.part(wholes[index]) for index in small]
            torch._foreach_copy_([self._places[index][world.rank] for index in small], own)
            world.join_parts(self._room)()
            found = [self._places[index] for index in small]
            torch._foreach_copy_([wholes[index].view(world.size, -1) for index in small], found)
        for wait in waits:
            wait()

    def _sent(self, index: int, gradient: Tensor | None, part: float | None) -> Tensor:
        """A large gradient, as this rank's part of the sum."""
        if gradient is None or part == 0:
            return torch.zeros_like(self._like[index], memory_format=torch.contiguous_format)
        sent = gradient.detach().to(self._dtype).contiguous()
        return sent.mul_(part) if part else sent
