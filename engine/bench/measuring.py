"""How fast one loader is with one export: a prompt at once, then one token after another.

Everything is done once before it is timed. Then each is timed several times, and the median counts: machines
do other things too. Given the tokens that another loader predicted, those are fed in place of this one's own,
so that each of them is compared whatever came before, and a single different word does not make all that
follows look different.

Memory is that of the process, or what is allocated on the GPU that torch computes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import msgspec
import psutil

from engine.config.loaders import Loader
from engine.run.benched import Measured, Request

REPEATS, FEWEST = 5, 3
"""Measurements of each, and how many where a single one takes long."""
ENOUGH_S = 60.0
"""Seconds after which the fewest suffice."""
WARM_TOKENS = 2
"""New tokens of the pass that is not timed."""


class Loaded(Protocol):
    """A model that is loaded, by whatever computes with it. It begins anew with each prompt."""

    device: str
    """In words."""
    precision: str
    """What it computes in; empty where that is not known."""

    def prefill(self, prompt: Sequence[int]) -> int:
        """Read a prompt; the likeliest token after it."""

    def decode(self, token: int) -> int:
        """Read one more token; the likeliest after that."""


class Memory(Protocol):
    """What is noted before a model is loaded, and asked afterwards."""

    kind: str

    def held(self) -> int | None:
        """Bytes that came to be held since."""

    def peak(self) -> int | None:
        """The most bytes that were held at any time."""


def measure(
    loader: Loader,
    load: Callable[[], Loaded],
    request: Request,
    memory: Memory,
    *,
    threads: int,
    heard: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Measured, list[int]]:
    """What :class:`~engine.run.benched.Measured` has to say, and the tokens that were predicted."""
    begin = time.monotonic()
    model = load()
    load_seconds = time.monotonic() - begin
    _pass(model, request, min(WARM_TOKENS, request.new_tokens))
    heard(1, 1 + REPEATS)
    timed: list[tuple[float, float]] = []
    tokens: list[int] = []
    begin = time.monotonic()
    while len(timed) < REPEATS and (len(timed) < FEWEST or time.monotonic() - begin < ENOUGH_S):
        prefill, decode, tokens = _pass(model, request, request.new_tokens)
        timed.append((prefill, decode))
        heard(1 + len(timed), 1 + REPEATS)
    held, peak = memory.held(), memory.peak()
    measured = Measured(
        loader=loader.name,
        format=request.format,
        device=model.device,
        precision=model.precision,
        prefill=len(request.prompt) / statistics.median(each for each, _ in timed),
        decode=(request.new_tokens - 1) / statistics.median(each for _, each in timed),
        repeats=len(timed),
        prompt_tokens=len(request.prompt),
        new_tokens=request.new_tokens,
        threads=threads,
        load_seconds=load_seconds,
        memory=memory.kind,
        model_bytes=None if held is None else max(0, held),
        peak_bytes=peak,
        file_bytes=weight_bytes(Path(request.folder)),
        versions=versions(loader),
        t=time.time(),
    )
    if request.forced:
        same = sum(one == other for one, other in zip(tokens, request.forced, strict=True))
        measured = msgspec.structs.replace(measured, agreement=same / len(tokens))
    return measured, tokens


def _pass(model: Loaded, request: Request, new_tokens: int) -> tuple[float, float, list[int]]:
    """Seconds of the prompt, seconds of the tokens after the first one, and all that were predicted."""
    begin = time.perf_counter()
    found = [model.prefill(request.prompt)]
    read = time.perf_counter()
    while len(found) < new_tokens:
        found.append(model.decode(request.forced[len(found) - 1] if request.forced else found[-1]))
    return read - begin, time.perf_counter() - read, found


def weight_bytes(folder: Path) -> int:
    """Bytes of an export's files of weights."""
    files = [
        file for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf") or ".onnx" in file.name
    ]
    return sum(file.stat().st_size for file in files)


def versions(loader: Loader) -> dict[str, str]:
    """Releases of what a loader is made of."""
    found = {}
    for package in loader.packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class HostMemory:
    """That of this process."""

    kind = "host"

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss

    def held(self) -> int:
        # What loading needed and the allocator keeps is not the model's.
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        return int(self._process.memory_info().rss - self._before)

    def peak(self) -> int:
        try:
            # Not by getrusage, whose figure a process takes over from the one that started it.
            said = Path("/proc/self/status").read_text()
            (line,) = [line for line in said.splitlines() if line.startswith("VmHWM:")]
            return int(line.split()[1]) * 1024
        except (OSError, ValueError):
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class GPUMemory:
    """What torch allocates on a GPU."""

    kind = "gpu"

    def __init__(self) -> None:
        import torch

        self._gpu = torch.cuda
        self._gpu.reset_peak_memory_stats()
        self._before = self._gpu.memory_allocated()

    def held(self) -> int:
        return int(self._gpu.memory_allocated() - self._before)

    def peak(self) -> int:
        return int(self._gpu.max_memory_allocated())


class UnknownMemory:
    """That of a GPU which torch does not compute on."""

    kind = "gpu"

    def held(self) -> None:
        return None

    def peak(self) -> None:
        return None
