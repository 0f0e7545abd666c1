"""The processes that train one model together, each on a share of the sequences.

Sequence ``i`` lies with rank ``i mod size``. Whatever is trained is the same on every rank, bit for bit: the
gradients are added up before each step (:mod:`engine.training.averaged`), and everything that is decided from
numbers is decided from numbers that all ranks have.

:data:`ALONE` is one process, which agrees with itself at no cost. :class:`Together` is several: what lies on
a GPU is added up there by NCCL; what the host knows (sums of losses, whether memory was short, how far the
first rank is) goes through gloo, and while it waits for others, a process hears what it is asked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

T = TypeVar("T")
Wait = Callable[[], object]
"""For what was begun on the device."""

LONGEST_WAIT_DAYS = 365
"""For others, before a library takes them for dead: as long as a full disk may be waited for. Whoever watches
the processes ends them much sooner where one has died."""
EAGER_SECONDS, SHORT, LONG = 0.02, 5e-5, 2e-3
"""Others are asked for often at first, later on rarely; seconds."""
HEARING_SECONDS = 0.2
HINTS = {
    # Processes of one machine find each other also where its name leads nowhere.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # Whoever watches the processes says which of them died; torch would end this one before it could.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
"""For the libraries, where the user says nothing else."""


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is; here the only one."""

    rank: int = 0
    size: int = 1

    @property
    def several(self) -> bool:
        return self.size > 1

    # The share of the sequences

    def share(self, count: int) -> range:
        """Which of the first ``count`` sequences lie here."""
        return range(self.rank, count, self.size)

    def own(self, rows: Tensor) -> Tensor:
        """Those of ``rows`` that lie here."""
        return rows if self.size == 1 else rows[rows % self.size == self.rank]

    def places(self, rows: Tensor) -> Tensor:
        """Where these sequences, which lie here, are among those that do."""
        return rows if self.size == 1 else rows // self.size

    # What all know

    def add_(self, tensor: Tensor, *, mean: bool = False) -> None:
        """Put the sum over all ranks, or the mean, in the place of a tensor of the device."""

    def part(self, tensor: Tensor) -> Tensor:
        """The flat part of a contiguous tensor that is this rank's: as many numbers as any other's.

        A view, for a tensor whose numbers the ranks share out evenly (:meth:`divides`).
        """
        return tensor.detach().view(self.size, -1)[self.rank]

    def divides(self, numbers: int) -> bool:
        """Whether so many are shared out evenly."""
        return numbers % self.size == 0

    def add_parts(self, tensor: Tensor, own: Tensor, *, mean: bool = False) -> Wait:
        """Begin to put this rank's :meth:`part` of the sum over all ranks, or of the mean, into ``own``. What
        is left in ``tensor``, of the device, is nobody's. Both are left alone until what comes back is
        called, which has the device wait, not the host."""
        own.copy_(self.part(tensor))
        return _nothing

    def join_parts(self, tensor: Tensor) -> Wait:
        """Begin to put every rank's :meth:`part` of a tensor of the device where it belongs on all of them;
        as with :meth:`add_parts`."""
        return _nothing

    def alike(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors of the device the values that they have on the first rank."""

    def sums(self, values: Sequence[float]) -> list[float]:
        """Of numbers of the host, over all ranks; the same bits on each."""
        return list(values)

    def least(self, values: Sequence[int]) -> list[int]:
        """The smallest of each over all ranks."""
        return list(values)

    def tell(self, value: Any) -> None:
        """Say something to the other ranks, which hear it (:meth:`Together.told`)."""

    def gathered(self, value: T, kind: type[T]) -> list[T]:
        """What every rank says, in their order; ``kind`` is its type."""
        return [value]

    def note_wait(self, seconds: float) -> None:
        """So long did this rank wait for the others in a step."""

    @property
    def last_wait(self) -> float | None:
        """What was noted last; none for who is alone, and before the first step."""
        return None

    def mean(self, value: float | None, weight: float) -> float | None:
        """Of every rank's ``value``, each counting by its ``weight``; none where nothing has any."""
        if self.size == 1:
            return value
        total, weights = self.sums([(value or 0.0) * weight if weight else 0.0, weight])
        return total / weights if weights else None


ALONE = World()


@dataclass(frozen=True)
class Together(World):
    """One of several processes of this machine."""

    hears: Callable[[float], None] = field(default=lambda waited: None, compare=False)
    """Called while this process waits for others, with how many seconds it has; what it raises ends that."""
    waits: list[float] = field(default_factory=list, compare=False)

    def note_wait(self, seconds: float) -> None:
        self.waits[:] = [seconds]

    @property
    def last_wait(self) -> float | None:
        return self.waits[0] if self.waits else None

    def add_(self, tensor: Tensor, *, mean: bool = False) -> None:
        import torch.distributed as dist

        if tensor.is_cuda:
            # In the order of the current stream; the host goes on.
            dist.all_reduce(tensor, dist.ReduceOp.AVG if mean else dist.ReduceOp.SUM)
            return
        self._wait(dist.all_reduce(tensor, async_op=True))
        if mean:
            tensor.div_(self.size)

    def add_parts(self, tensor: Tensor, own: Tensor, *, mean: bool = False) -> Wait:
        import torch.distributed as dist

        if tensor.is_cuda:
            scatter = _newest(dist, "reduce_scatter_single", "reduce_scatter_tensor")
            how = dist.ReduceOp.AVG if mean else dist.ReduceOp.SUM
            wait: Wait = scatter(own, tensor.detach().view(-1), how, async_op=True).wait
            return wait
        # Gloo's own form adds up the whole as well, and never says that it is done.
        self.add_(tensor, mean=mean)
        own.copy_(self.part(tensor))
        return _nothing

    def join_parts(self, tensor: Tensor) -> Wait:
        import torch.distributed as dist

        gather = _newest(dist, "all_gather_single", "all_gather_into_tensor")
        flat, own = tensor.detach().view(-1), self.part(tensor)
        work = gather(flat, own, async_op=True)
        if tensor.is_cuda:
            wait: Wait = work.wait
            return wait
        self._wait(work)
        return _nothing

    def alike(self, tensors: Iterable[Tensor]) -> None:
        import torch.distributed as dist

        for tensor in tensors:
            whole = tensor.detach().contiguous()
            if tensor.is_cuda:
                dist.broadcast(whole, 0)
            else:
                self._wait(dist.broadcast(whole, 0, async_op=True))
            if whole.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(whole)

    def sums(self, values: Sequence[float]) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64)
        self.add_(tensor)
        found: list[float] = tensor.tolist()
        return found

    def least(self, values: Sequence[int]) -> list[int]:
        import torch.distributed as dist

        tensor = torch.tensor(list(values), dtype=torch.int64)
        self._wait(dist.all_reduce(tensor, dist.ReduceOp.MIN, async_op=True))
        found: list[int] = tensor.tolist()
        return found

    def tell(self, value: Any) -> None:
        import torch.distributed as dist

        said = _packed(value)
        self._wait(dist.broadcast(torch.tensor([len(said)]), 0, async_op=True))
        self._wait(dist.broadcast(said, 0, async_op=True))

    def told(self, kind: type[T]) -> T:
        """What the first rank tells; ``kind`` is its type."""
        import torch.distributed as dist

        length = torch.zeros(1, dtype=torch.int64)
        self._wait(dist.broadcast(length, 0, async_op=True))
        said = torch.empty(int(length), dtype=torch.uint8)
        self._wait(dist.broadcast(said, 0, async_op=True))
        return _unpacked(said, kind)

    def gathered(self, value: T, kind: type[T]) -> list[T]:
        import torch.distributed as dist

        said = _packed(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._wait(dist.all_gather(lengths, torch.tensor([len(said)]), async_op=True))
        most = max(map(int, lengths))
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: len(said)] = said
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self._wait(dist.all_gather(found, padded, async_op=True))
        return [_unpacked(one[: int(length)], kind) for one, length in zip(found, lengths, strict=True)]

    def _wait(self, work: Any) -> None:
        """Until all ranks have come so far."""
        began = heard = time.monotonic()
        while not work.is_completed():
            now = time.monotonic()
            time.sleep(SHORT if now - began < EAGER_SECONDS else LONG)
            if now - heard >= HEARING_SECONDS:
                heard = now
                self.hears(now - began)
        work.wait()  # raises what went wrong


class _Tensor(msgspec.Struct):
    """A tensor on its way."""

    dtype: str
    shape: list[int]
    data: bytes


def _nothing() -> None:
    """Is left to wait for."""


def _newest(module: Any, *names: str) -> Callable[..., Any]:
    """The first of these functions that this version of torch has: it has renamed them."""
    found: Callable[..., Any] = next(getattr(module, name) for name in names if hasattr(module, name))
    return found


def _packed(value: Any) -> Tensor:
    """Structs, dataclasses, tuples, numbers, text and tensors of the host as bytes."""

    def plain(tensor: Any) -> _Tensor:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        name = str(tensor.dtype).removeprefix("torch.")
        return _Tensor(name, list(tensor.shape), flat.view(torch.uint8).numpy().tobytes())

    encoded = bytearray(msgspec.msgpack.encode(value, enc_hook=plain))  # never empty
    return torch.frombuffer(encoded, dtype=torch.uint8)


def _unpacked(said: Tensor, kind: type[T]) -> T:
    def tensor(kind: type, found: Any) -> Tensor:
        parts = msgspec.convert(found, _Tensor)
        made = torch.empty(parts.shape, dtype=getattr(torch, parts.dtype))
        if parts.data:
            made.view(-1).view(torch.uint8).numpy()[:] = memoryview(parts.data)
        return made

    return msgspec.msgpack.decode(said.numpy().tobytes(), type=kind, dec_hook=tensor)


def meeting_place(host: str, port: int, size: int, *, hosts: bool, restarts: int = 0) -> Any:
    """Where the processes find each other: a connection to it, and with ``hosts`` the place itself (at any
    port that is free, where that is 0). One that outlives them knows what they said before each of so many
    ``restarts``; nobody hears that any more."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    store = TCPStore(host, port, size, is_master=hosts, wait_for_workers=False)
    return PrefixStore(f"restart-{restarts}", store) if restarts else store


def open_world(
    store: Any,
    rank: int,
    size: int,
    device: torch.device,
    hears: Callable[[float], None] = lambda waited: None,
) -> Together:
    """Join the others, which meet at ``store``."""
    from datetime import timedelta

    import torch.distributed as dist

    for name, value in HINTS.items():
        os.environ.setdefault(name, value)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(days=LONGEST_WAIT_DAYS)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    world = Together(rank, size, hears)
    # The first meeting of all makes the connections, and NCCL's buffers before others take the memory.
    world.add_(torch.zeros(1, device=device))
    world.least([0])
    return world


def close_world() -> None:
    """Leave the others."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
