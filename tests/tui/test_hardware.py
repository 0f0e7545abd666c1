"""Live memory from a driver that tells everything, half of it, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from waiting import PATIENCE

from eqat_tui.hardware import Sampler


class Driver:
    """Two GPUs, the first shared with a process of another container; ``broken`` ones raise."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.gone = False

    def nvmlInit(self) -> None:
        pass

    def nvmlShutdown(self) -> None:
        if self.gone:
            raise self.NVMLError("GPU is lost")

    def nvmlDeviceGetCount(self) -> int:
        if self.gone:
            raise self.NVMLError("GPU is lost")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=(handle + 1) << 30, free=(79 - handle) << 30, total=80 << 30)

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA A100"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=50 + handle)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 60

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle:
            raise self.NVMLError("Not Supported")
        return 250_000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 400_000

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        if handle:
            return []
        return [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=1 << 29),
            SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None),
        ]


def test_two_gpus_one_of_them_shared(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path, nvml=Driver())
    first, second = sampler.sample().gpus
    assert (first.used, first.total, first.power, first.power_limit) == (1 << 30, 80 << 30, 250.0, 400.0)
    assert (second.power, second.utilization) == (None, 51.0)
    ours, other = first.processes
    assert (ours.pid, ours.bytes) == (os.getpid(), 1 << 29)
    assert ours.name
    assert (other.name, other.bytes) == ("", None)
    sampler.close()


def test_a_driver_that_goes_away_is_a_sentence(tmp_path: Path) -> None:
    driver = Driver()
    sampler = Sampler(tmp_path, nvml=driver)
    assert len(sampler.sample().gpus) == 2
    driver.gone = True
    reading = sampler.sample()
    assert reading.gpus == ()
    assert "lost" in reading.gpu_problem
    driver.gone = False
    assert sampler.sample().gpu_problem == ""
    sampler.close()


def test_host_numbers_are_those_of_this_machine(tmp_path: Path) -> None:
    host = Sampler(tmp_path).sample().host
    assert host.total == psutil.virtual_memory().total
    assert 0 < host.used <= host.total
    assert host.cores == os.cpu_count()
    assert 0 < host.disk_free <= host.disk_total


def test_our_engines_are_found_with_their_run(tmp_path: Path) -> None:
    run = tmp_path / "20251124-1600-tiny"
    code = "import time; time.sleep(600)"
    # What an engine looks like from outside, without importing torch.
    child = subprocess.Popen([sys.executable, "-c", code, "-m", "engine", str(run)])
    try:
        found: dict[int, str] = {}
        deadline = time.monotonic() + PATIENCE
        while child.pid not in found and time.monotonic() < deadline:
            found = {one.pid: one.run for one in Sampler(tmp_path).sample().engines}
        assert found[child.pid] == run.name
    finally:
        child.kill()
        child.wait()


def test_a_reading_costs_next_to_nothing(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path)
    sampler.sample()
    costs = []
    for _ in range(20):
        begun = time.thread_time()
        sampler.sample()
        costs.append(time.thread_time() - begun)
    # Now and then it looks for engines among all processes; most readings are those in between.
    assert sorted(costs)[10] < 0.005


@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="needs an NVIDIA GPU")
def test_a_real_gpu_is_read(tmp_path: Path) -> None:
    reading = Sampler(tmp_path).sample()
    assert reading.gpus
    assert 0 < reading.gpus[0].used <= reading.gpus[0].total
