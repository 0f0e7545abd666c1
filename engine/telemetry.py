"""What the machine is doing while a run trains: GPU and host memory, utilisation, temperature, disk.

Sampling happens on a thread of its own, once a second, through NVML and psutil; it never touches the CUDA
context, so it cannot make the training loop wait.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from engine.run.events import Memory
from engine.system.allowance import memory_available

SAMPLE_SECONDS = 1.0


def peak_host_bytes() -> int:
    """Largest resident memory of this process since the last :func:`reset_peaks`."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


def peak_gpu_bytes(device: torch.device) -> int | None:
    """Largest allocated GPU memory since the last :func:`reset_peaks`; none on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def release_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps what a phase has freed for the next allocation of the same size. The next phase makes others,
    so the process would go on holding the largest phase's memory, and report it as its own, until it ends.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library; nothing to trim
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reset_peaks(device: torch.device) -> None:
    """Start new peaks, so that each phase reports its own."""
    release_memory()
    try:
        # Resets VmHWM on Linux; where it is not permitted, peaks are those of the whole process.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _free_bytes(place: Path) -> int | None:
    """Room on the disk of a run; none once the run was deleted or moved, which others say."""
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


class _Gpu:
    """NVML readings of one device; anything the driver does not offer is none."""

    def __init__(self, device: torch.device) -> None:
        import pynvml

        self.nvml = pynvml
        pynvml.nvmlInit()
        # CUDA_VISIBLE_DEVICES renumbers devices for torch but not for NVML; the UUID names the same card in
        # both.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self.nvml.NVMLError:
            return None

    def sample(self) -> dict[str, int | float | None]:
        nvml, handle = self.nvml, self.handle
        memory = self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        rates = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        power = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        processes = self._ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
        mine = [p.usedGpuMemory or 0 for p in processes if p.pid == os.getpid()]
        used = None if memory is None else int(memory.used)
        return {
            "gpu_used": used,
            "gpu_total": None if memory is None else int(memory.total),
            "gpu_other": used - sum(mine) if used is not None and mine else None,
            "gpu_utilization": None if rates is None else rates.gpu,
            "gpu_temperature": self._ask(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            "gpu_power": None if power is None else power / 1000,
        }


class Telemetry:
    """Calls ``emit`` with a :class:`Memory` event once a second until closed."""

    def __init__(self, device: torch.device, run_path: Path, emit: Callable[[Memory], None]) -> None:
        self.device, self.run_path, self.emit = device, run_path, emit
        self._process = psutil.Process()
        self._gpu = self._open_gpu()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="telemetry", daemon=True)
        self._thread.start()

    def _open_gpu(self) -> _Gpu | None:
        if self.device.type != "cuda":
            return None
        try:
            return _Gpu(self.device)
        except Exception:
            # No usable NVML (a container without the driver's library): the run goes on without GPU readings.
            return None

    def _loop(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.emit(self.sample())

    def sample(self) -> Memory:
        """One reading."""
        gpu: dict[str, Any] = {} if self._gpu is None else self._gpu.sample()
        return Memory(
            **gpu,
            gpu_peak=peak_gpu_bytes(self.device),
            host_used=int(self._process.memory_info().rss),
            host_peak=peak_host_bytes(),
            host_available=memory_available(),
            disk_free=_free_bytes(self.run_path),
        )

    def close(self) -> None:
        self._done.set()
        self._thread.join(timeout=5)
