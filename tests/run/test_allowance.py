"""What control groups leave a process of memory and processors, in both of their versions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.plan.machine import detect
from engine.system import allowance

GIB = 2**30
Tree = Callable[..., None]
NO_LIMIT = 9223372036854771712  # what version 1 says of a group without one


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Makes control groups of ``files`` and puts this process into the one that ``own`` names; the machine
    has 64 processors."""

    def made(own: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        (tmp_path / "own").write_text(own)
        monkeypatch.setattr(allowance, "GROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(allowance, "OWN", tmp_path / "own")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))

    return made


CONTAINER = {"memory.max": str(8 * GIB), "memory.current": str(3 * GIB), "cpu.max": "1600000 100000"}
JOB = {  # a step of a batch job in a host's tree: the job has a limit, the step has none of its own
    "memory.stat": "inactive_file 5",
    "system.slice/job_7/memory.max": str(4 * GIB),
    "system.slice/job_7/memory.current": str(3 * GIB),
    "system.slice/job_7/memory.stat": f"anon 17\ninactive_file {GIB}\nfile 3",
    "system.slice/job_7/cpu.max": "250000 100000",
    "system.slice/job_7/step_0/memory.max": "max",
    "system.slice/job_7/step_0/memory.current": str(2 * GIB),
    "system.slice/job_7/step_0/cpu.max": "max 100000",
}
FIRST = {
    "memory/memory.limit_in_bytes": str(NO_LIMIT),
    "memory/memory.usage_in_bytes": "5",
    "memory/docker/a/memory.limit_in_bytes": str(6 * GIB),
    "memory/docker/a/memory.usage_in_bytes": str(2 * GIB),
    "memory/docker/a/memory.stat": f"inactive_file 9\ntotal_inactive_file {GIB}",
    "cpu/cpu.cfs_quota_us": "-1",
    "cpu/cpu.cfs_period_us": "100000",
    "cpu/docker/a/cpu.cfs_quota_us": "300000",
    "cpu/docker/a/cpu.cfs_period_us": "100000",
}
OWN_FIRST = "12:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n2:cpuset:/other\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "left", "processors"),
    [
        ("0::/\n", CONTAINER, 5 * GIB, 16),
        ("0::/docker/abc\n", CONTAINER, 5 * GIB, 16),  # a name of the host's, which is not seen in here
        ("0::/../../elsewhere\n", CONTAINER, 5 * GIB, 16),
        ("0::/system.slice/job_7/step_0\n", JOB, 2 * GIB, 3),  # two and a half processors keep three busy
        ("0::/system.slice\n", JOB, None, 64),
        (OWN_FIRST, FIRST, 5 * GIB, 3),
        ("12:memory:/docker/a\n0::/\n", FIRST | CONTAINER, 5 * GIB, 16),  # one of each version
        ("0::/\n", {"memory.max": str(GIB), "memory.current": str(2 * GIB)}, 0, 64),
        ("0::/\n", {"cpu.max": "5000 100000"}, None, 1),
        ("0::/\n", {"cpu.max": "9900000 100000"}, None, 64),  # more than there are
        ("0::/\n", {"cpu.max": "", "memory.max": "", "memory.stat": "inactive_file x"}, None, 64),
        ("0::/\n", {"cpu.max": "100000 0", "memory.max": "-1", "memory.current": "1"}, None, 64),
        ("nonsense\n::\n", {}, None, 64),
        ("", {}, None, 64),
    ],
)
def test_the_narrowest_limit_holds(
    own: str, files: dict[str, str], left: int | None, processors: int, tree: Tree
) -> None:
    tree(own, files)
    assert allowance.memory_left() == left
    assert allowance.processors() == processors


def test_a_limit_of_version_1_that_is_none_leaves_what_the_machine_has(tree: Tree) -> None:
    tree("", {"memory/memory.limit_in_bytes": str(NO_LIMIT), "memory/memory.usage_in_bytes": "5"})
    assert allowance.memory_available() < (allowance.memory_left() or 0)


def test_the_plan_counts_with_what_the_process_may_have(tree: Tree, tmp_path: Path) -> None:
    tree("0::/\n", {"memory.max": "700", "memory.current": "200", "cpu.max": "300000 100000"})
    machine = detect(tmp_path, "cpu")
    assert (machine.host_free, machine.cpus) == (500, 3)


@pytest.mark.parametrize(
    ("asked", "processes", "gpu", "found"),
    [
        (0, 1, False, 64),
        (0, 4, False, 16),
        (0, 100, False, 1),
        (5, 4, True, 5),
        (48, 1, True, 48),
        (0, 1, True, 16),
        (0, 4, True, 16),
        (0, 8, True, 8),
    ],
)
def test_threads(asked: int, processes: int, gpu: bool, found: int, tree: Tree) -> None:
    tree("", {})
    assert allowance.threads(asked, processes, gpu=gpu, there=allowance.processors()) == found


def test_without_control_groups_it_is_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "GROUPS", tmp_path / "none")
    monkeypatch.setattr(allowance, "OWN", tmp_path / "none")
    assert allowance.memory_left() is None
    assert allowance.processors() == len(os.sched_getaffinity(0))
