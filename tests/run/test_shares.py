"""Each of several runs at a time has a part of the machine that no other has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.run.shares import ALL, Share, shares


@given(jobs=st.integers(1, 12), cores=st.sets(st.integers(0, 200), min_size=1, max_size=40))
def test_cores_are_shared_out_without_overlap(jobs: int, cores: set[int]) -> None:
    there = sorted(cores)
    if jobs > len(there):
        with pytest.raises(UsageError, match="need a core each"):
            shares(jobs, ["auto"], [], there)
        return
    found = shares(jobs, ["auto", "cpu"], [], there)
    taken = [core for share in found for core in share.cores]
    assert len(found) == jobs
    assert len({len(share.cores) for share in found}) == 1
    assert len(taken) == len(set(taken)) >= len(there) - jobs + 1
    assert set(taken) <= cores
    assert len({share.name for share in found}) == jobs


def test_each_has_a_gpu_as_cuda_names_it() -> None:
    found = shares(2, ["auto", "cuda"], ["GPU-1f", "3", "5"], [0, 1])
    assert [share.environment for share in found] == [
        {"CUDA_VISIBLE_DEVICES": "GPU-1f"},
        {"CUDA_VISIBLE_DEVICES": "3"},
    ]
    assert [share.cores for share in found] == [(), ()]
    assert len(shares(0, ["cuda"], ["0", "1", "2"], [0])) == 3
    assert [share.gpu for share in shares(0, ["cpu"], ["0", "1"], [0, 1])] == [""]


def test_each_has_as_many_gpus_as_compute_a_run_together() -> None:
    found = shares(0, ["auto"], ["0", "1", "GPU-2", "3", "4"], [0], together=2)
    assert [(share.gpu, share.name) for share in found] == [("0,1", "GPUs 0,1"), ("GPU-2,3", "GPUs GPU-2,3")]
    with pytest.raises(UsageError, match="3 runs at a time need 2 GPUs each, and 5 can be seen") as told:
        shares(3, ["auto"], list("01234"), [0], together=2)
    assert told.value.hint == "--jobs 2 at most"
    for jobs in (0, 2):
        with pytest.raises(UsageError, match="need 4 GPUs each, and 3 can be seen") as told:
            shares(jobs, ["auto"], list("012"), [0], together=4)
        assert told.value.hint == "--gpus 3 at most"


@pytest.mark.parametrize(
    ("jobs", "devices", "gpus", "words"),
    [
        (3, ["cuda"], ["0", "1"], "3 runs at a time need a GPU each, and 2 can be seen"),
        (2, ["auto", "cuda:1"], ["0", "1"], "is cuda:1, and each of several runs at a time has a GPU"),
        (5, ["cpu"], ["0"], "5 runs at a time need a core each, and there are 2"),
    ],
)
def test_what_there_is_not_is_refused(jobs: int, devices: list[str], gpus: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        shares(jobs, devices, gpus, [0, 1])


def test_a_process_stays_on_its_cores() -> None:
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", "import os; input(); print(os.sched_getaffinity(0))"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        Share(cores=(core,)).confine(child.pid)
        assert child.communicate("\n")[0].strip() == f"{{{core}}}"
    Share(cores=(core,)).confine(child.pid)  # it is gone: nothing to do
    assert ALL.environment == {}
