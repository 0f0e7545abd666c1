"""A run whose processes something else has started, torchrun or a step of Slurm's: they find each other by
what their environment says, and whatever becomes of one of them, it is as with those that the run starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from engine_runs import Child, exported, of, output
from waiting import PATIENCE, wait_until

from engine.errors import PreflightError
from engine.ranks.follower import work
from engine.ranks.others import RUN_KEY, begin, ready_key
from engine.ranks.place import FIRST_PORT, LOCAL_HOST, PORTS, Place, place_of
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.launch import ATTEMPT_VARIABLE, ENGINE, python_environment
from engine.run.liveness import run_state
from engine.training.world import meeting_place

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]

TWO = {"runtime.gpus": 2, "block_ap.epochs": 4, "evaluation.windows": 2}


@pytest.fixture
def uninterrupted(finished_once: Make) -> dict[str, str]:
    """What TWO exports where the run starts its processes itself, and nobody interferes."""
    return exported(finished_once(**TWO))


class Started:
    """Processes that a test started; what they print comes into one file."""

    def __init__(self, log: Path) -> None:
        self.log, self.all = log, list[subprocess.Popen[bytes]]()

    def __call__(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        there = {**python_environment(), **environment}
        with self.log.open("ab") as log:
            # Not among the test's own processes: a signal to a whole group must not reach those.
            process = subprocess.Popen(
                [sys.executable, *command], env=there, stdout=log, stderr=log, start_new_session=True
            )
        self.all.append(process)
        return process

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    made = Started(tmp_path / "output")
    yield made
    for process in made.all:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait(PATIENCE)


def free_step() -> dict[str, str]:
    """A step of two tasks, as Slurm tells each of them, at whose port nobody is."""
    for job in range(os.getpid() % PORTS, os.getpid() % PORTS + 1000):
        step = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_NODES": "1"}
        step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_GTIDS": "0,1", "SLURM_PROCID": "0"}
        place = place_of(2, step)
        assert place is not None
        assert FIRST_PORT <= place.port < FIRST_PORT + PORTS
        with socket.socket() as one:
            if one.connect_ex((place.host, place.port)):
                return step
    raise AssertionError("every port is taken")


def task(number: int, step: dict[str, str]) -> dict[str, str]:
    return step | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}


def become(environment: dict[str, str]) -> None:
    """In this process, which no command of ours has started."""
    del os.environ[ATTEMPT_VARIABLE]
    os.environ.update(environment)


def forked_step(engine: Engine, run: RunDirectory) -> list[Child]:
    """An engine in each of two tasks, once they have trained for a while."""
    step, seen = free_step(), trained(run)
    tasks = [engine(run, before=partial(become, task(number, step))) for number in (0, 1)]
    tasks[0].until(lambda: trained(run) > seen + 2)
    return tasks


def trained(run: RunDirectory) -> int:
    return len(of(run, events.Metric))


def test_a_step_computes_a_run_and_whatever_happens_to_a_task_ends_both(
    make: Make, engine: Engine, started: Started, uninterrupted: dict[str, str]
) -> None:
    run = make(**TWO)
    # A task is killed, which Slurm need not mind: the run says which, and the other one goes.
    first, second = forked_step(engine, run)
    second.kill()
    assert first.code() == 137, output(run)
    assert f"rank 1 (process {second.pid}) is gone" in of(run, events.Error)[-1].message
    assert run_state(run) == "failed"

    # It is the first one.
    first, second = forked_step(engine, run)
    first.kill()
    assert second.code() == 75, output(run)
    assert f"the first process ({first.pid}) is gone, and so is rank 1" in output(run)

    # Slurm sends what it has to say to all tasks; that is one request to stop, and no abort.
    first, second = forked_step(engine, run)
    for one in (second, first):
        one.send(signal.SIGTERM)
    assert (first.code(), second.code()) == (75, 75), output(run)
    assert run_state(run) == "stopped"
    assert "Traceback" not in output(run)

    step = free_step()
    tasks = [started(*ENGINE, str(run.path), **task(number, step)) for number in (0, 1)]
    assert [one.wait(PATIENCE) for one in tasks] == [0, 0], started.said()
    assert started.said() == "", "nobody has anything to complain of"
    assert exported(run) == uninterrupted


def test_torchrun_starts_the_processes_and_starts_them_anew(
    make: Make, started: Started, uninterrupted: dict[str, str]
) -> None:
    """Its agent has the place where they meet, which knows what they said before one was killed."""
    run = make(**TWO)
    options = ("--nproc-per-node", "2", "--max-restarts", "1", "--standalone")
    agent = started("-m", "torch.distributed.run", *options, "-m", "engine", str(run.path))
    wait_until(lambda: trained(run) > 2 or agent.poll() is not None)
    assert agent.poll() is None, started.said()
    told = {one: one.environ() for one in psutil.Process(agent.pid).children()}
    (second,) = (one for one, environment in told.items() if environment.get("RANK") == "1")
    assert told[second]["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    second.kill()
    assert agent.wait(PATIENCE) == 0, started.said()
    assert f"rank 1 (process {second.pid}) is gone" in of(run, events.Error)[-1].message
    assert len(of(run, events.RunStarted)) == 2
    assert exported(run) == uninterrupted


def test_a_port_that_somebody_else_has_is_refused(make: Make) -> None:
    run = make(**TWO)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place = Place(0, 2, 0, LOCAL_HOST, taken.getsockname()[1])
        with pytest.raises(PreflightError, match=f"cannot meet at port {place.port}") as refused:
            begin(run, (), 1, 2, torch.device("cpu"), place)
    assert "\n" not in str(refused.value)
    assert "MASTER_PORT" in refused.value.hint


def test_the_processes_of_two_runs_do_not_compute_together(make: Make) -> None:
    """Where both were told the same port."""
    run, another = make(**TWO), make(**TWO, **{"grid.bits": 2})
    store = meeting_place(LOCAL_HOST, 0, 2, hosts=True)
    store.set(RUN_KEY, run.id)
    place = Place(1, 2, 1, LOCAL_HOST, store.port)
    with pytest.raises(PreflightError, match=f"the processes of {run.id} meet"):
        work(another, another.config(), 1, place)
    assert not store.check([ready_key(1)])
