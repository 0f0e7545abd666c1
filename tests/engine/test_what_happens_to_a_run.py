"""What else happens to a run: it is deleted under its engine, started twice, worked on when it is done."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_runs import Child, exported, make_run, of, output, run_here, start, wait_until

from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.run.state import load_state
from engine.telemetry import Telemetry

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]

LONG = {"block_ap.sequences": 16, "block_ap.epochs": 200, "runtime.checkpoint_minutes": 1e-4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = make_run(tmp_path_factory.mktemp("runs"))
    assert start(run).code() == 0, output(run)
    return run


@pytest.fixture
def done(finished: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A finished run of the test's own."""
    shutil.copytree(finished.path, tmp_path / "runs" / finished.id)
    return RunDirectory.open(tmp_path / "runs" / finished.id)


def tasks(run: RunDirectory) -> list[tuple[int, str]]:
    return [(event.attempt, event.task) for event in of(run, events.RunStarted)]


@pytest.mark.parametrize("task", ["export", "eval"])
def test_a_killed_export_or_evaluation_leaves_a_done_run_done(
    done: RunDirectory, engine: Engine, task: str
) -> None:
    before = exported(done)
    for attempt in range(2, 12):
        child = engine(done, arguments=("--task", task))
        child.until(lambda attempt=attempt: (attempt, task) in tasks(done))
        child.send(signal.SIGKILL)
        child.code()
        assert run_state(done) == "done"
        assert load_state(done).outcome == "done"
        assert exported(done) == before
        if of(done, events.RunFinished)[-1].attempt < attempt:
            break  # it was in the middle
    else:
        pytest.fail("every attempt was faster than its kill")
    assert run_here(done, "--task", task) == 0
    assert run_state(done) == "done"


def test_a_refused_task_leaves_a_done_run_done(done: RunDirectory) -> None:
    assert run_here(done, "--task", "generate", "--prompt", " ") == 2
    assert run_here(done, "--task", "eval", "--set", "block_ap.epochs=9") == 8
    assert run_state(done) == "done"


def test_an_export_that_finds_a_damaged_block_says_so_and_resuming_trains_it_again(
    done: RunDirectory,
) -> None:
    before = exported(done)
    path = max(done.checkpoints_dir.glob("objects/*.safetensors"), key=lambda place: place.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    assert run_here(done, "--task", "export") == 8
    said = of(done, events.Error)[-1]
    assert "damaged" in said.message
    assert f"eqat resume {done.id}" in said.hint
    assert run_state(done) == "failed", "a done run could not be resumed"
    assert exported(done) == before
    assert run_here(done) == 0
    assert run_state(done) == "done"
    assert exported(done) == before
    told = [event.message for event in of(done, events.Warning) if event.code == "checkpoint"]
    assert any("damaged" in message and "block" in message for message in told), told


def test_a_damaged_run_that_is_done_can_be_resumed_at_once(done: RunDirectory) -> None:
    before = exported(done)
    again = eqat(done, "resume", done.id)
    assert "is done already" in again.communicate(timeout=120)[1]
    assert again.returncode == 2
    generation = max(done.checkpoints_dir.glob("generation-*.json"))
    generation.write_bytes(generation.read_bytes()[:-7])
    for path in done.checkpoints_dir.glob("spare-*.json"):
        path.unlink()
    resumed = eqat(done, "resume", done.id)
    said = resumed.communicate(timeout=240)[1]
    assert resumed.returncode == 0, said
    assert "its checkpoint is damaged" in said
    assert exported(done) == before


def test_the_machine_is_looked_at_also_when_the_run_is_gone(tmp_path: Path) -> None:
    """By a thread, whose failure would be a traceback in the log."""
    telemetry = Telemetry(torch.device("cpu"), tmp_path / "gone", lambda reading: None)
    try:
        assert telemetry.sample().disk_free is None
    finally:
        telemetry.close()


def test_a_run_that_is_moved_under_its_engine_is_told_and_not_made_anew(
    make: Make, engine: Engine, tmp_path: Path
) -> None:
    run = make(**LONG)
    child = engine(run)
    child.until(lambda: of(run, events.CheckpointCommitted))
    moved = tmp_path / "moved"
    run.path.rename(moved)
    assert child.code() == 3
    assert not run.path.exists()
    said = of(RunDirectory(moved), events.Error)[-1]
    assert "deleted or moved while its engine worked" in said.message
    assert "Traceback" not in output(RunDirectory(moved))


def test_a_run_that_is_deleted_under_its_engine_is_not_made_anew(make: Make, engine: Engine) -> None:
    run = make(**LONG)
    child = engine(run)
    child.until(lambda: of(run, events.CheckpointCommitted))
    gone = run.path.with_name(".gone")
    run.path.rename(gone)  # a deletion meets files that come and go
    shutil.rmtree(gone, ignore_errors=True)
    assert child.code() == 3
    assert not run.path.exists()


def eqat(run: RunDirectory, *arguments: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-m", "eqat_tui", *arguments, "--runs-dir", str(run.path.parent)],
        env={**os.environ, "PYTHONPATH": root, "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_whoever_follows_a_run_that_is_deleted_is_told_in_one_line(make: Make) -> None:
    run = make(**LONG)
    follower = eqat(run, "resume", run.id)
    wait_until(lambda: of(run, events.CheckpointCommitted))
    gone = run.path.with_name(".gone")
    run.path.rename(gone)
    said = follower.communicate(timeout=60)[1]
    assert follower.returncode == 3
    assert "deleted or moved while its engine worked" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not run.path.exists()


def test_of_two_engines_on_one_run_the_loser_says_who_works(make: Make, engine: Engine) -> None:
    run = make(**LONG)
    first = engine(run)
    first.until(lambda: run_state(run) == "running")
    assert engine(run).code() == 3
    assert f"already being worked on by process {first.pid}" in output(run)
    assert run_state(run) == "running"


def test_of_two_resumes_at_once_the_loser_says_who_works(make: Make) -> None:
    """Which of them is first, and whether the other sees that before or after it has started an engine, is
    the system's to decide."""
    run = make()
    both = [eqat(run, "resume", run.id) for _ in range(2)]
    said = {process: process.communicate(timeout=120)[1] for process in both}
    lost = [process for process in both if process.returncode]
    # 2 only where the other was done already, which a tiny run may be.
    late = "is done already" in "".join(said.values())
    assert sorted(process.returncode for process in both) == [0, 2 if late else 3], said
    words = said[lost[0]].splitlines()[-1]
    assert (
        "already being worked on by process" in words or "is running" in words or "is done already" in words
    )
    assert "Traceback" not in "".join(said.values())
    assert run_state(run) == "done"
    assert of(run, events.Export)[-1].verified
