"""The next batch travels to the GPU while this one is computed.

A batch is the same sequences of several activation stores. Copies from host memory run on a stream of their
own; a file is read by a thread. Stores that lie on the device are read when they are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from engine.data.activations import ActivationStore


class Prefetcher:
    """Reads the same sequences of ``stores``, one batch ahead once it is told which comes next."""

    def __init__(self, stores: Sequence[ActivationStore]) -> None:
        self._stores = stores
        self._device = stores[0].device
        self._ahead = self._device.type == "cuda" and any(store.kind != "device" for store in stores)
        self._expected: list[int] | None = None
        self._waiting: list[Tensor] = []
        self._reading: list[Future[None]] = []
        self._threads: ThreadPoolExecutor | None = None
        if self._ahead:
            self._stream = torch.cuda.Stream(self._device)
            self._ready = [torch.cuda.Event() for _ in stores]
            self._taken = torch.cuda.Event()
            if any(store.kind == "disk" for store in stores):
                self._threads = ThreadPoolExecutor(len(stores), thread_name_prefix="prefetch")

    def expect(self, rows: Tensor) -> None:
        """``rows`` will be read next."""
        if not self._ahead:
            return
        self._settle()
        self._expected = rows.tolist()
        if not self._waiting or len(self._waiting[0]) != len(rows):
            shapes = [(len(rows), *store.shape[1:]) for store in self._stores]
            self._waiting = [
                torch.empty(shape, dtype=store.dtype, device=self._device)
                for shape, store in zip(shapes, self._stores, strict=True)
            ]
        # What was taken from here before must be gone, and what was written to the stores must be there.
        self._taken.record(torch.cuda.current_stream(self._device))
        for number in range(len(self._stores)):
            if self._threads is None:
                self._fetch(number)
            else:
                self._reading.append(self._threads.submit(self._fetch, number))

    def _fetch(self, number: int) -> None:
        assert self._expected is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._taken)
            self._stores[number].read_into(self._expected, self._waiting[number])
            self._ready[number].record(self._stream)

    def _settle(self) -> None:
        """Let reading threads finish; what went wrong there is raised here."""
        reading, self._reading = self._reading, []
        for future in reading:
            future.result()

    def read(self, rows: Tensor, targets: Sequence[Tensor]) -> None:
        """The sequences ``rows`` of every store into ``targets``, ``[len(rows), T, H]`` on the device."""
        self._settle()
        expected, self._expected = self._expected, None
        if expected is None or expected != rows.tolist():
            for store, target in zip(self._stores, targets, strict=True):
                store.read_into(rows, target)
            return
        here = torch.cuda.current_stream(self._device)
        for ready, waiting, target in zip(self._ready, self._waiting, targets, strict=True):
            here.wait_event(ready)
            target.copy_(waiting)

    def close(self) -> None:
        """Stop reading ahead; nothing is under way any more."""
        if self._ahead:
            for future in self._reading:
                future.exception()
            self._reading = []
            self._stream.synchronize()
        if self._threads is not None:
            self._threads.shutdown()
        self._expected, self._waiting = None, []
