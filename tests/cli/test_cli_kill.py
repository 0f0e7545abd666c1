"""Ending an engine that gives no sign of life, and going on with its run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_tools import Eqat, at_work, ended, start_eqat
from waiting import stands_still, wait_until

from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.run.lock import holder
from engine.run.state import load_state

OLD = 1_000_000_000


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[RunDirectory]:
    """A run at work, by an engine that trains nothing."""
    ended(start_eqat(tmp_path, "works", "run", "smoke", "--device", "cpu", "--detach"))
    run = at_work(tmp_path)
    pid = holder(run.lock_path)
    assert pid is not None
    yield run
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def hang(run: RunDirectory) -> int:
    """Stop the engine in the middle of whatever it does, long ago."""
    pid = holder(run.lock_path)
    assert pid
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: stands_still(pid))  # before that it may still write its status
    status = json.loads(run.status_path.read_bytes())
    run.status_path.write_text(json.dumps({**status, "heartbeat": OLD}))
    os.utime(run.lock_path, (OLD, OLD))
    assert run_state(run) == "hung"
    return pid


def test_a_hung_engine_is_asked_and_then_killed(eqat: Eqat, engine: RunDirectory) -> None:
    pid = hang(engine)
    asked = eqat("stop", "latest")
    assert asked.returncode == 0
    assert "no sign of life" in asked.stderr
    assert f"eqat stop {engine.id} --kill" in asked.stderr
    assert (run_state(engine), holder(engine.lock_path)) == ("hung", pid)
    killed = eqat("stop", "latest", "--kill")
    assert killed.returncode == 0, killed.stderr
    assert f"killed process {pid}" in killed.stderr
    assert f"eqat resume {engine.id}" in killed.stderr
    # It is gone when the command returns, so that what comes next is not refused.
    assert holder(engine.lock_path) is None
    assert run_state(engine) == "crashed"


def test_a_killed_run_goes_on(eqat: Eqat, tmp_path: Path, engine: RunDirectory) -> None:
    hang(engine)
    assert eqat("stop", "latest", "--kill").returncode == 0
    resumed = start_eqat(tmp_path, "finishes", "resume", "latest")
    ended(resumed)
    assert (resumed.returncode, load_state(engine).attempt) == (0, 2)


def test_a_run_that_is_over_cannot_be_killed(eqat: Eqat, finished_run: RunDirectory) -> None:
    refused = eqat("stop", finished_run.id, "--kill")
    assert (refused.returncode, "is not running (done)" in refused.stderr) == (2, True)


def test_what_a_killed_engine_waited_for_is_not_shown_of_the_next(
    tmp_path: Path, engine: RunDirectory
) -> None:
    pid = hang(engine)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: holder(engine.lock_path) is None)
    status = json.loads(engine.status_path.read_bytes())
    engine.status_path.write_text(json.dumps({**status, "waiting": "the disk is full: so it was"}))
    process = start_eqat(tmp_path, "finishes", "resume", "latest")
    _, err = ended(process)
    assert process.returncode == 0
    assert "the disk is full" not in err
