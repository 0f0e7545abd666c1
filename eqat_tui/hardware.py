"""What this machine is doing now: GPU memory and load by process, host memory, disk.

Asked through NVML and psutil from the app's own process, so it works when no run is ours, on GPUs that others
use too. Whatever the driver does not say is ``None``; a driver that goes away becomes a sentence, not an
error.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from engine.system.files import existing

ENGINES_EVERY_S = 5.0
"""The list of all processes is searched for engines this often; between, only the known ones are measured."""


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A process on a GPU, or one of our engines."""

    pid: int
    name: str = ""
    """Empty for one of another container, of which only the number is known."""
    user: str = ""
    bytes: int | None = None
    engine: bool = False
    run: str = ""
    """Name of the run that an engine works on."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One device; bytes, per cent, degrees Celsius, watts."""

    index: int
    name: str
    used: int
    total: int
    free: int
    utilization: float | None = None
    temperature: float | None = None
    power: float | None = None
    power_limit: float | None = None
    processes: tuple[Process, ...] = ()


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """Memory and disk, bytes; ``cpu`` is per cent of all cores."""

    used: int
    total: int
    available: int
    swap_used: int
    cpu: float
    cores: int
    load: float | None
    disk_free: int
    disk_total: int


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at one moment."""

    t: float
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str = ""
    """Why there are none."""
    host: Host
    engines: tuple[Process, ...] = ()
    """Our engines on this machine, with their resident memory."""


class Sampler:
    """Takes readings; ``place`` is on the disk that counts, ``nvml`` stands in for the driver in tests."""

    def __init__(self, place: Path, *, nvml: Any = None) -> None:
        self._place = place
        self._nvml, self._problem = (nvml, "") if nvml is not None else _open_driver()
        if nvml is not None:
            nvml.nvmlInit()
        self._engines: list[tuple[Any, str]] = []
        self._searched = float("-inf")
        import psutil

        psutil.cpu_percent()  # its first answer is since boot

    def sample(self) -> Reading:
        """One reading."""
        engines = self._measure_engines()
        return Reading(
            t=time.time(),
            gpus=self._gpus({engine.pid: engine for engine in engines}),
            gpu_problem=self._problem,
            host=self._host(),
            engines=engines,
        )

    def close(self) -> None:
        """Give the driver back."""
        if self._nvml is not None:
            self._ask(self._nvml.nvmlShutdown)

    # -- GPUs --------------------------------------------------------------------------------------

    def _gpus(self, engines: dict[int, Process]) -> tuple[Gpu, ...]:
        if self._nvml is None:
            return ()
        try:
            gpus = [self._gpu(index, engines) for index in range(self._nvml.nvmlDeviceGetCount())]
        except self._nvml.NVMLError as error:
            self._problem = f"the driver does not answer: {error}"
            return ()
        self._problem = "" if gpus else "the driver knows no GPU"
        return tuple(gpus)

    def _gpu(self, index: int, engines: dict[int, Process]) -> Gpu:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        name = nvml.nvmlDeviceGetName(handle)
        rates = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        power = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        limit = self._ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        found = self._ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
        processes = [_on_gpu(one.pid, one.usedGpuMemory, engines) for one in found]
        return Gpu(
            index=index,
            name=name.decode() if isinstance(name, bytes) else str(name),
            used=int(memory.used),
            total=int(memory.total),
            free=int(memory.free),
            utilization=None if rates is None else float(rates.gpu),
            temperature=self._ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            power=None if power is None else power / 1000,
            power_limit=None if limit is None else limit / 1000,
            processes=tuple(sorted(processes, key=lambda one: -(one.bytes or 0))),
        )

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (self._nvml.NVMLError, AttributeError):  # not offered by this device, or by this driver
            return None

    # -- the host ----------------------------------------------------------------------------------

    def _host(self) -> Host:
        import psutil

        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        disk = shutil.disk_usage(existing(self._place))
        try:
            load: float | None = os.getloadavg()[0]
        except OSError:
            load = None
        return Host(
            used=int(memory.total - memory.available),
            total=int(memory.total),
            available=int(memory.available),
            swap_used=int(swap.used),
            cpu=float(psutil.cpu_percent()),
            cores=os.cpu_count() or 1,
            load=load,
            disk_free=disk.free,
            disk_total=disk.total,
        )

    def _measure_engines(self) -> tuple[Process, ...]:
        import psutil

        now = time.monotonic()
        if now - self._searched >= ENGINES_EVERY_S:
            self._searched = now
            self._engines = list(_find_engines())
        measured = []
        for process, run in self._engines:
            try:
                measured.append(
                    Process(
                        pid=process.pid,
                        name="eqat engine",
                        user=process.username(),
                        bytes=int(process.memory_info().rss),
                        engine=True,
                        run=run,
                    )
                )
            except psutil.Error:
                continue  # it has ended
        return tuple(measured)


def _open_driver() -> tuple[Any, str]:
    """pynvml, ready; or why not."""
    try:
        import pynvml
    except ImportError:
        return None, "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        words = str(error)
        missing = "Library Not Found" in words or "Driver Not Loaded" in words
        return None, "no NVIDIA driver on this machine" if missing else f"the driver does not answer: {words}"
    return pynvml, ""


def _on_gpu(pid: int, used: int | None, engines: dict[int, Process]) -> Process:
    if pid in engines:
        return msgspec.structs.replace(engines[pid], bytes=used)
    import psutil

    try:
        process = psutil.Process(pid)
        return Process(pid=pid, name=process.name(), user=process.username(), bytes=used)
    except psutil.Error:  # of another container or user: the number is all there is
        return Process(pid=pid, bytes=used)


def _find_engines() -> Any:
    """Our engines among all processes: ``python … -m engine RUN_DIR``."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        for index, word in enumerate(words[:-2]):
            if word == "-m" and words[index + 1] == "engine":
                yield process, Path(words[index + 2]).name
                break
