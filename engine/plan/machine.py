"""What this machine has to offer, asked through NVML and psutil: no torch, no CUDA context."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec

from engine.run.proof import is_run
from engine.system.allowance import memory_available, processors
from engine.system.files import existing


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Free resources, bytes. ``gpu_name`` is none where there is no GPU that the engine could use."""

    gpu_name: str | None
    gpu_free: int
    gpu_total: int
    host_free: int
    disk_free: int
    """What a run that is resumed has written already counts as free: it is part of what the run needs."""
    cpus: int
    avx512: bool = True
    gpus: int = 0
    """That CUDA would show."""
    nvlink: bool | None = None
    """There is NVLink between every two GPUs of a run, and NCCL may use it; none where nobody says."""


def detect(directory: Path | None = None, device: str = "auto", gpus: int = 1) -> Machine:
    """This machine now; ``directory`` is where runs are written, or one of them; ``device`` says which GPU is
    meant. Of several ``gpus`` the one counts that has least."""
    name, free, total = (None, 0, 0) if device == "cpu" else _gpu(_index(device))
    for other in range(1, gpus) if name is not None else ():
        another, its_free, its_total = _gpu(other)
        if another is not None:
            free, total = min(free, its_free), min(total, its_total)
    place = directory or Path.cwd()
    return Machine(
        gpu_name=name,
        gpu_free=free,
        gpu_total=total,
        host_free=memory_available(),
        disk_free=shutil.disk_usage(existing(place)).free + _written(place),
        cpus=processors(),
        avx512=_has_avx512(),
        gpus=0 if name is None else len(visible_gpus()),
        nvlink=None if name is None or gpus == 1 else _nvlink(gpus),
    )


def _written(directory: Path) -> int:
    """Bytes on the disk of a run, if this is one."""
    if not is_run(directory):
        return 0
    written = 0
    for path in directory.rglob("*"):
        try:
            written += path.lstat().st_blocks * 512
        except OSError:  # gone meanwhile
            continue
    return written


@contextmanager
def _nvml() -> Iterator[Any]:
    """NVML for as long as it is asked something; none where there is no GPU that the engine could use."""
    if _torch_is_cpu_build():
        yield None
        return
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, no permission: for the plan all of them mean no GPU
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would show this process, each as CUDA_VISIBLE_DEVICES names it."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
            return _entries()
        try:
            return [str(index) for index in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError:
            return []


def _entries() -> list[str]:
    """Of CUDA_VISIBLE_DEVICES, which renumbers what CUDA shows."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [part.strip() for part in visible.split(",") if part.strip()]


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _gpu(index: int) -> tuple[str | None, int, int]:
    """Name, free and total memory of the ``index``-th GPU that CUDA would show this process."""
    with _nvml() as nvml:
        if nvml is None:
            return None, 0, 0
        try:
            handle = _handle(nvml, index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            name = nvml.nvmlDeviceGetName(handle)
        except (nvml.NVMLError, IndexError, ValueError):
            return None, 0, 0
        return name.decode() if isinstance(name, bytes) else str(name), int(memory.free), int(memory.total)


def _nvlink(gpus: int) -> bool | None:
    """Whether there is NVLink between every two of the first ``gpus`` that CUDA would show this process, and
    NCCL may use it.

    NVML is asked of pairs, not of the links of each GPU: those are up as well where a bridge leads to one
    neighbour and to no other, and behind an NVSwitch what they lead to is the switch. One pair without it is
    enough to slow all of them down, for a sum passes through every GPU.
    """
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return False
    with _nvml() as nvml:
        if nvml is None:
            return None
        try:
            handles = [_handle(nvml, index) for index in range(gpus)]
            said = {
                nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
                for one, other in combinations(handles, 2)
            }
        except (nvml.NVMLError, IndexError, ValueError, AttributeError):  # the last: an older module
            return None
        if nvml.NVML_P2P_STATUS_UNKNOWN in said:
            return None
        return said == {nvml.NVML_P2P_STATUS_OK}


def _handle(nvml: Any, index: int) -> Any:
    """NVML does not follow CUDA_VISIBLE_DEVICES."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        return nvml.nvmlDeviceGetHandleByIndex(index)
    entry = _entries()[index]
    if entry.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(entry)
    return nvml.nvmlDeviceGetHandleByIndex(int(entry))


def _torch_is_cpu_build() -> bool:
    """A GPU is of no use to a torch without CUDA; its version says so without an import."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _has_avx512() -> bool:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return any("avx512f" in line for line in lines if line.startswith("flags"))
    except OSError:
        return False
