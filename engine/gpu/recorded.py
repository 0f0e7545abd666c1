"""Recording a function's GPU work once and replaying it (CUDA graphs).

A step of a small block is some hundred kernels of a few microseconds; launching them one by one takes the
host ten times as long as the GPU needs to run them. A recorded graph is one launch. It also leaves the
interpreter free for other threads: without it a checkpoint that is written meanwhile makes every step slower.

What is recorded always works on the same memory: inputs are copied into fixed tensors first, and results are
tensors that the next replay overwrites.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Graphed(Generic[T]):
    """``function``, recorded at the first call and replayed from then on.

    Everything that must not be recorded (compiling, choosing algorithms) has to have happened before, so run
    the plain function once. ``on_failure`` is told why recording is impossible; the function then runs as it
    is, for ever, as it does on a CPU.
    """

    def __init__(
        self, function: Callable[[], T], device: torch.device, on_failure: Callable[[str], None]
    ) -> None:
        self._function = function
        self._device = device
        self._on_failure = on_failure
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: T
        self.possible = device.type == "cuda"

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def __call__(self) -> T:
        if self._graph is None and self.possible:
            self._record()
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result

    def forget(self) -> None:
        """Drop the graph and its memory; the next call records again."""
        if self._graph is not None:
            torch.cuda.current_stream(self._device).synchronize()
            self._graph = None
            del self._result

    def _record(self) -> None:
        here = torch.cuda.current_stream(self._device)
        here.synchronize()
        # The memory of the plain run goes to the recording, which cannot use what lies in torch's cache.
        torch.cuda.empty_cache()
        graph, aside = torch.cuda.CUDAGraph(), _recording_stream(self._device)
        try:
            with torch.cuda.stream(aside):
                # Other threads may use the driver meanwhile (copies of the next batch, checkpoints).
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    result = self._function()
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.possible = False
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(self._device)
            self._on_failure(str(error).strip().splitlines()[0])
            return
        here.wait_stream(aside)
        self._graph, self._result = graph, result


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: for each stream that multiplies matrices torch keeps a workspace of 32 MiB for
    ever. It is made here, so that it does not become part of a graph's memory.

    Of another priority than the streams that copies run on: torch deals 32 streams of each priority in turn,
    and what a thread copied on the very stream that records would become part of the recording.
    """
    stream = torch.cuda.Stream(device, priority=-1)
    with torch.cuda.stream(stream):
        some = torch.ones(16, 16, device=device)
        torch.mm(some, some)
    return stream
