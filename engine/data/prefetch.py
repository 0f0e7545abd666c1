"""The next batches travel to the GPU while this one is computed, and its result back while they are.

A batch is the same sequences of several activation stores. Copies from and to host memory run on a stream of
their own; a file is read and written by threads. Stores that lie on the device are read when they are wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from engine.data.activations import ActivationStore

Rows = Tensor | range
"""Positions of sequences in a store."""
READ_AHEAD = 2
"""Batches of a file that are read ahead; of memory it is one."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without the host waiting for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class _Batch:
    """Where a batch that is read ahead waits, one tensor for each store."""

    def __init__(self, device: torch.device, stores: int) -> None:
        self.rows: list[int] = []
        self.waiting: list[Tensor] = []
        self.ready = [torch.cuda.Event() for _ in range(stores)]
        """Has arrived."""
        self.taken = torch.cuda.Event()
        """Others may take its place."""
        self.taken.record(torch.cuda.current_stream(device))
        self.reading: list[Future[None]] = []

    def settle(self) -> None:
        """Let reading threads finish; what went wrong there is raised here."""
        reading, self.reading = self.reading, []
        for future in reading:
            future.result()


class Prefetcher:
    """Reads the same sequences of ``stores`` ahead, once it is told which come next.

    A file is read ahead by several batches: a reading thread waits for its turn among other threads, and with
    one batch alone the GPU would wait with it.
    """

    def __init__(self, stores: Sequence[ActivationStore]) -> None:
        self._stores = stores
        self._device = stores[0].device
        self._ahead = self._device.type == "cuda" and any(store.kind != "device" for store in stores)
        self._expected: deque[_Batch] = deque()
        self._free: list[_Batch] = []
        self._threads: ThreadPoolExecutor | None = None
        if self._ahead:
            self._stream = torch.cuda.Stream(self._device)
            reads = any(store.kind == "disk" for store in stores)
            self._free += [_Batch(self._device, len(stores)) for _ in range(READ_AHEAD if reads else 1)]
            if reads:
                self._threads = ThreadPoolExecutor(len(stores), thread_name_prefix="prefetch")

    def expect(self, rows: Rows) -> None:
        """``rows`` will be read after what is expected already; nothing happens if they are, or if there is
        no place for them."""
        if not self._free:
            return
        wanted = _listed(rows)
        if any(batch.rows == wanted for batch in self._expected):
            return
        batch = self._free[-1]
        if not batch.waiting or len(batch.waiting[0]) != len(wanted):
            self._stream.synchronize()  # a batch that nobody wanted may still be arriving
            batch.waiting = []  # also when memory does not suffice for others
            shapes = [(len(wanted), *store.shape[1:]) for store in self._stores]
            batch.waiting = [
                torch.empty(shape, dtype=store.dtype, device=self._device)
                for shape, store in zip(shapes, self._stores, strict=True)
            ]
            # New memory may have been somebody's whose work is not finished.
            batch.taken.record(torch.cuda.current_stream(self._device))
        batch.rows = wanted
        self._expected.append(self._free.pop())
        for number in range(len(self._stores)):
            if self._threads is None:
                self._fetch(batch, number)
            else:
                batch.reading.append(self._threads.submit(self._fetch, batch, number))

    def _fetch(self, batch: _Batch, number: int) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(batch.taken)
            self._stores[number].read_into(batch.rows, batch.waiting[number])
            batch.ready[number].record(self._stream)

    def read_into(self, rows: Rows, targets: Sequence[Tensor]) -> None:
        """The sequences ``rows`` of every store into ``targets``, ``[len(rows), T, H]`` on the device."""
        if self._expected and self._expected[0].rows != _listed(rows):
            self._drop()
        if not self._expected:
            for store, target in zip(self._stores, targets, strict=True):
                store.read_into(rows, target)
        else:
            batch = self._expected.popleft()
            self._free.append(batch)
            batch.settle()
            here = torch.cuda.current_stream(self._device)
            for ready, waiting, target in zip(batch.ready, batch.waiting, targets, strict=True):
                here.wait_event(ready)
                target.copy_(waiting)
        # From here on another batch may come: what waited is taken, what was written to the stores before is
        # there. It does not wait for what is done with this batch.
        for batch in self._free:
            batch.taken.record(torch.cuda.current_stream(self._device))

    def read(self, rows: Rows) -> list[Tensor]:
        """The same into new tensors."""
        targets = [
            torch.empty((len(rows), *store.shape[1:]), dtype=store.dtype, device=store.device)
            for store in self._stores
        ]
        self.read_into(rows, targets)
        return targets

    def _drop(self) -> None:
        """Nobody wants what was expected."""
        while self._expected:
            batch = self._expected.popleft()
            self._free.append(batch)
            batch.settle()

    def close(self) -> None:
        """Stop reading ahead; nothing is under way any more."""
        for batch in self._expected:
            for future in batch.reading:
                future.exception()
        if self._threads is not None:
            self._threads.shutdown()
        if self._ahead:
            self._stream.synchronize()
        self._expected.clear()
        self._free.clear()


def _listed(rows: Rows) -> list[int]:
    return list(rows) if isinstance(rows, range) else rows.tolist()


class WriteBehind:
    """Writes to a store while the GPU goes on. At the end of the context everything is there."""

    PENDING = 4
    """Batches on their way to a file at the same time."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._behind = store.device.type == "cuda" and store.kind != "device"
        self._writing: deque[Future[None]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        if self._behind:
            self._stream = torch.cuda.Stream(store.device)
            if store.kind == "disk":
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-behind")

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._writing:
                self._oldest(raises=error is None)
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._behind:
                torch.cuda.current_stream(self._store.device).wait_stream(self._stream)

    def write(self, start: int, tensor: Tensor) -> None:
        """Overwrite the sequences from ``start`` on."""
        if not self._behind:
            self._store.write(start, tensor)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._store.device))
        with torch.cuda.stream(self._stream):
            tensor.record_stream(self._stream)
            if self._thread is None:
                self._store.write(start, tensor)
                return
            host = torch.empty(tensor.shape, dtype=self._store.dtype, pin_memory=True)
            host.copy_(tensor.to(self._store.dtype), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        while len(self._writing) >= self.PENDING:
            self._oldest()
        self._writing.append(self._thread.submit(self._write, start, host, copied))

    def _write(self, start: int, host: Tensor, copied: torch.cuda.Event) -> None:
        copied.synchronize()
        self._store.write(start, host)

    def _oldest(self, raises: bool = True) -> None:
        error = self._writing.popleft().exception()
        if error is not None and raises:
            raise error


class InPlace:
    """A store on its way through a function, batch by batch: read ahead, written behind."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._reader, self._writer = Prefetcher((store,)), WriteBehind(store)

    def __enter__(self) -> InPlace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()
        self._writer.__exit__(kind, error, trace)

    def read(self, rows: range, following: Iterable[range]) -> Tensor:
        """``[len(rows), T, H]`` on the device; ``following`` is what will be read next, in that order."""
        (batch_BTH,) = self._reader.read(rows)
        for expected in following:
            self._reader.expect(expected)
        return batch_BTH

    def write(self, start: int, tensor: Tensor) -> None:
        """Overwrite the sequences from ``start`` on, which have been read."""
        self._writer.write(start, tensor)
