"""Engines of other machines, whose locks are not seen here."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import wait_until

from engine.__main__ import main
from engine.config.loading import load
from engine.errors import PreflightError
from engine.run.directory import RunDirectory
from engine.run.elsewhere import SILENT_S
from engine.run.event_log import EventWriter
from engine.run.events import AttemptStarting, RunFinished
from engine.run.housekeeping import delete_run
from engine.run.launch import launch
from engine.run.liveness import run_state
from engine.run.lock import RunLock, is_held
from engine.run.shown import summarize
from engine.run.status import Status, read_status, write_status
from engine.system import this_machine
from eqat_tui.actions import kill_engine
from eqat_tui.run_text import state_words

REPOSITORY = Path(__file__).parents[2]
AWAY = {"machine": "another-boot", "host": "n7", "pid": 42}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that an attempt has begun with."""
    made = RunDirectory.create(tmp_path / "runs", load("smoke"))
    with EventWriter(made.events_path, 1) as writer:
        writer.emit(AttemptStarting(pid=42, host="n7"))
    return made


def says(run: RunDirectory, **fields: object) -> None:
    """The attempt's status, as its own machine has written it just now."""
    assert write_status(run, Status(**{"heartbeat": time.time(), "attempt": 1, **AWAY, **fields}))  # type: ignore[arg-type]


def last_written(run: RunDirectory, seconds_ago: float) -> None:
    then = time.time() - seconds_ago
    os.utime(run.status_path, (then, then))


def test_an_engine_elsewhere_runs_while_it_writes_hangs_while_it_only_writes_and_is_gone_after(
    run: RunDirectory,
) -> None:
    says(run)
    assert run_state(run) == "running"
    assert state_words(summarize(run)) == "starting on n7"
    says(run, heartbeat=time.time() - 1000, grace_s=60.0)
    assert run_state(run) == "hung"
    says(run, heartbeat=time.time() - 1000, grace_s=3600.0)
    assert run_state(run) == "running"
    last_written(run, SILENT_S + 5)
    assert run_state(run) == "crashed"


def test_clocks_may_differ_by_less_than_the_patience_and_a_future_one_is_not_believed_for_ever(
    run: RunDirectory,
) -> None:
    says(run, heartbeat=time.time() + 60)
    last_written(run, -60)
    assert run_state(run) == "running"
    last_written(run, -SILENT_S - 5)
    assert run_state(run) == "crashed"


def test_nobody_begins_with_or_deletes_what_an_engine_elsewhere_works_on(
    run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    says(run)
    for attempted in (lambda: launch(run), lambda: delete_run(run)):
        with pytest.raises(PreflightError, match="process 42 on n7 works on it"):
            attempted()
    with pytest.raises(PreflightError, match=r"process 42, started on n7\) cannot be killed from here"):
        kill_engine(run)
    # Nor does an engine that was started by hand, whatever looked before it.
    before = run.events_path.read_bytes(), run.status_path.read_bytes()
    assert main([str(run.path)]) == 3
    assert "process 42 on n7" in capfd.readouterr().err
    assert (run.events_path.read_bytes(), run.status_path.read_bytes()) == before


@pytest.mark.parametrize("kind", ["finished", "ended", "former", "rebooted", "container", "older"])
def test_what_is_no_sign_of_life_from_elsewhere(run: RunDirectory, kind: str) -> None:
    expected = "crashed"
    if kind == "finished":  # the log had room for its end
        says(run)
        with EventWriter(run.events_path, 1) as writer:
            writer.emit(RunFinished(outcome="stopped", exit_code=75, seconds=1.0))
        expected = "stopped"
    elif kind == "ended":  # or its status had
        says(run, outcome="stopped", exit_code=75)
        expected = "stopped"
    elif kind == "former":
        says(run)
        with EventWriter(run.events_path, 2) as writer:
            writer.emit(AttemptStarting(pid=1, host=socket.gethostname()))
    elif kind == "rebooted":  # this machine, before it was started anew
        says(run, host=this_machine.node())
    elif kind == "container":  # of this machine, whose locks are seen
        says(run, machine=this_machine.identity())
    else:  # a version that did not say where it was
        run.status_path.write_text(f'{{"heartbeat": {time.time()}, "pid": 42}}')
    assert run_state(run) == expected


def test_a_job_that_slurm_begins_anew_takes_over_from_itself_and_no_other_job_does(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.run.elsewhere import refuse_if_elsewhere

    says(run, job="12_3", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(PreflightError):
        refuse_if_elsewhere(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    refuse_if_elsewhere(run)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    with pytest.raises(PreflightError):
        refuse_if_elsewhere(run)


def test_a_wait_for_room_on_a_full_disk_is_seen_from_elsewhere(run: RunDirectory) -> None:
    says(run, waiting="the disk is full")
    found = read_status(run)
    assert found is not None
    assert found.waiting == "the disk is full"
    assert summarize(run)["waiting"] == "the disk is full"


def test_a_process_says_what_machine_and_job_it_is_of(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    assert write_status(run, Status(attempt=1))
    found = read_status(run)
    assert found is not None
    assert (found.machine, found.host, found.job) == (this_machine.identity(), "n3", "15")
    monkeypatch.setenv("SLURM_JOB_ID", "15; rm -r")
    assert this_machine.batch_job() == ""


# -- another machine, as far as one kernel can be two -------------------------------------------------------

OTHER = """
import sys, time
from engine.run.directory import RunDirectory
from engine.run.lock import RunLock
from engine.run.status import Status, write_status
run = RunDirectory.open(sys.argv[1])
if sys.argv[2] == "lock":
    RunLock(run.lock_path).acquire()
while True:
    write_status(run, Status(attempt=1, heartbeat=time.time()))
    time.sleep(0.2)
"""
Elsewhere = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Elsewhere]:
    """Starts a process on the host n7, whose kernel has booted as another."""
    unshare = shutil.which("unshare")
    boot = tmp_path / "boot_id"
    boot.write_text("00000000-1111-2222-3333-444444444444\n")
    inside = f"mount --bind {boot} {this_machine.BOOT_ID} && hostname n7 && exec "
    tried = unshare and subprocess.run(
        [unshare, "--mount", "--uts", "sh", "-c", f"{inside} true"], capture_output=True
    )
    if not tried or tried.returncode:
        pytest.skip("needs the right to make namespaces")
    begun: list[subprocess.Popen[bytes]] = []

    def start(run: RunDirectory, how: str) -> subprocess.Popen[bytes]:
        words = [unshare, "--mount", "--uts", "sh", "-c", f'{inside} "$@"', "sh", sys.executable, "-c", OTHER]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        begun.append(subprocess.Popen([*words, str(run.path), how], env=environment))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


def test_an_engine_on_another_host_is_seen_by_its_lock_or_without_it(
    run: RunDirectory, elsewhere: Elsewhere
) -> None:
    process = elsewhere(run, "no lock")
    wait_until(run.status_path.exists)
    assert not is_held(run.lock_path)
    assert run_state(run) == "running"
    assert summarize(run)["node"] == "n7"
    with pytest.raises(PreflightError, match=f"process {process.pid} on n7"):
        launch(run)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run_state(run) == "running"  # which cannot be known yet
    last_written(run, SILENT_S + 5)
    assert run_state(run) == "crashed"

    process = elsewhere(run, "lock")
    wait_until(lambda: is_held(run.lock_path))
    assert run_state(run) == "running"
    with pytest.raises(PreflightError, match=f"process {process.pid}"), RunLock(run.lock_path):
        pass
