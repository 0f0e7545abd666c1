"""The queue: runs one after the other, whatever ends one of them or whoever works on it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import at_work, ended, environment, start_eqat
from waiting import PATIENCE, wait_until

from engine.config.derived import resolve
from engine.config.loading import load
from engine.run import control
from engine.run.finding import list_runs
from engine.run.lock import holder
from engine.run.queue import Queue, entry_state
from engine.run.state import load_state
from eqat_tui import queueing
from eqat_tui.cli import _run_command
from eqat_tui.queue_text import left_alone
from eqat_tui.queue_worker import Worker

pytestmark = pytest.mark.usefixtures("no_engine_outlives_its_test")


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """The queue of this machine, which is empty."""
    monkeypatch.setenv("EQAT_STATE_DIR", str(tmp_path / "state"))
    return Queue()


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """``eqat queue ARGUMENTS`` in this process: how it ended, and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = _run_command(["queue", *arguments])
        return code, *capsys.readouterr()

    return run


def add(queue: Queue, where: Path, *bits: int) -> None:
    """Entries whose runs differ by their bits, by which the scripted engine knows what to do."""
    (where / "runs").mkdir(exist_ok=True)
    with queue.changing():
        for count in bits:
            changes = {"grid.bits": count, "runtime.device": "cpu"}
            queue.add(resolve(load("smoke", overrides=changes)), where / "runs")


def works(where: Path, script: str) -> subprocess.Popen[str]:
    """Somebody who works on the queue."""
    return start_eqat(where, script, "queue", "work", EQAT_STATE_DIR=str(where / "state"))


def states(queue: Queue) -> list[str]:
    queue.read()
    return [entry_state(entry) for entry in queue.entries]


def attempts(where: Path) -> list[int]:
    return [load_state(run).newest_attempt for run in reversed(list_runs(where / "runs"))]


def test_a_failing_and_a_dying_run_do_not_stop_the_others(queue: Queue, call: Call, tmp_path: Path) -> None:
    add(queue, tmp_path, 2, 3, 4)
    _, err = ended(process := works(tmp_path, "2=fails,3=dies,4=finishes"))
    assert (process.returncode, "Traceback" in err) == (0, False), err
    assert states(queue) == ["failed", "crashed", "done"]
    assert attempts(tmp_path) == [1, 1, 1]
    assert queue.worker is None
    _, shown, _ = call("list")
    assert "3 of 3 over" in shown
    assert "1: too little text" in shown
    rows = json.loads(call("--json")[1])["entries"]
    assert [(row["turn"], row["run"]) for row in rows] == [
        ("over", run.id) for run in reversed(list_runs(tmp_path / "runs"))
    ]


def test_the_list_says_of_a_run_that_its_disk_is_full(queue: Queue, call: Call, tmp_path: Path) -> None:
    add(queue, tmp_path, 2)
    process = works(tmp_path, "waits")
    wait_until(lambda: "paused (disk full)" in call("list")[1])
    assert call("stop")[0] == 0
    ended(process)
    assert "(disk full)" not in call("list")[1]


def test_what_is_at_work_is_neither_moved_nor_taken_out(queue: Queue, call: Call, tmp_path: Path) -> None:
    add(queue, tmp_path, 2, 3)
    process = works(tmp_path, "works")
    at_work(tmp_path, 1)
    for arguments in (("move", "1", "last"), ("move", "1", "1"), ("remove", "1")):
        code, _, err = call(*arguments)
        assert (code, "entry 1: is at work (eqat stop " in err) == (3, True), err
    code, _, err = call("move", "2", "1")
    assert (code, "entry 1: does not wait" in err) == (2, True), err
    assert call("stop")[0] == 0
    ended(process)


def test_kills_and_stops_lose_nothing_and_begin_nothing_twice(queue: Queue, tmp_path: Path) -> None:
    add(queue, tmp_path, 2, 3)
    process = works(tmp_path, "works")
    run = at_work(tmp_path, 1)
    process.send_signal(signal.SIGKILL)
    ended(process)
    assert (states(queue), queue.worker) == (["running", "waiting"], None)
    assert "nobody works on it: eqat queue resume" in left_alone()
    # The next one follows it; a stop of the queue stops it so that it goes on.
    process = works(tmp_path, "works")
    wait_until(lambda: queue.worker == process.pid)
    assert queueing.stopped(queue) is not None
    ended(process)
    assert (states(queue), attempts(tmp_path)) == (["waiting", "waiting"], [1])
    assert load_state(run).outcome == "stopped"
    assert left_alone() == ""  # as it is meant to be
    assert (Worker(queue).work(), attempts(tmp_path)) == (0, [1])  # paused
    with queue.changing():
        queue.paused = False
    # So does a signal to whoever works on it.
    process = works(tmp_path, "works")
    wait_until(lambda: attempts(tmp_path) == [2])
    at_work(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert (process.returncode, states(queue)) == (75, ["waiting", "waiting"])
    # What somebody else stops stays stopped, and the next one has its turn.
    process = works(tmp_path, "works")
    wait_until(lambda: attempts(tmp_path) == [3])
    control.request(at_work(tmp_path, 1), "stop")
    assert at_work(tmp_path, 2).id != run.id
    assert states(queue) == ["stopped", "running"]
    with queue.changing():
        queue.put_back([1])
    process.send_signal(signal.SIGKILL)
    ended(process)
    control.request(at_work(tmp_path, 2), "abort")
    ended(process := works(tmp_path, "finishes"))
    # That one was aborted while nobody looked; the other one goes on where it was.
    assert (process.returncode, states(queue)) == (0, ["aborted", "done"])
    assert attempts(tmp_path) == [4, 1]


def test_an_entry_that_cannot_even_be_planned_does_not_stop_the_others(queue: Queue, tmp_path: Path) -> None:
    """Whatever is wrong with it: a configuration of an extension that is gone, a bug of ours."""
    add(queue, tmp_path, 2, 3)
    with queue.changing():
        queue.entries[0].config += "\n[toy]\nturns = 3\n"
        queue.entries[1].config = "not TOML"
    assert Worker(queue).work() == 0
    assert states(queue) == ["failed", "failed"]
    told = [entry.error.message for entry in queue.entries if entry.error is not None]
    assert "there is no such field" in told[0]
    assert "TOML" in told[1]


def test_killed_at_any_instant_it_goes_on(tmp_path: Path) -> None:
    """Every instant at which something is written, made or started, in real processes."""
    script = Path(__file__).with_name("queue_kills.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_logged_out_it_goes_on(queue: Queue, tmp_path: Path) -> None:
    """A run is added in a session of a terminal, which closes while the run is at work."""
    runs = tmp_path / "runs"
    one = ("smoke", "--device", "cpu", "--runs-dir", str(runs), "--set", "evaluation.enabled=false")
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have been told to ignore it
        added = [sys.executable, "-m", "eqat_tui", "queue", "add", *one]
        stays = ["sh", "-c", '"$@" && exec sleep 600', "sh", *added]  # as a shell does that somebody works in
        os.execve("/bin/sh", stays, environment(TERM="xterm-256color"))
    wait_until(lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n")
    wait_until(lambda: [holder(run.lock_path) for run in list_runs(runs)] not in ([], [None]))
    (run,) = list_runs(runs)
    engine, worker = holder(run.lock_path), queue.worker
    assert engine is not None
    assert worker is not None
    os.kill(engine, signal.SIGSTOP)  # so that it is at work still when the terminal is gone
    os.close(terminal)  # the kernel sends SIGHUP to whoever the terminal belonged to
    _, how = os.waitpid(child, 0)
    assert os.WTERMSIG(how) == signal.SIGHUP
    os.kill(engine, signal.SIGCONT)
    assert queue.worker == worker
    wait_until(lambda: states(queue) != ["running"])
    assert (states(queue), attempts(tmp_path)) == (["done"], [1])
    wait_until(lambda: queue.worker is None)
    told = [line.partition("1: ")[2] for line in queue.log_path.read_text().splitlines()]
    assert told == [f"run {run.id}", "done"], "another process has gone on with it"


def test_an_entry_is_of_several_gpus_as_a_run_would_be(queue: Queue, call: Call, tmp_path: Path) -> None:
    assert call("pause")[0] == 0
    two = ("add", "smoke", "--device", "cpu", "--gpus", "2", "--runs-dir", str(tmp_path / "runs"))
    assert call(*two)[0] == 0
    queue.read()
    assert queue.entries[0].configuration().runtime.gpus == 2
    code, _, err = call(*two, "--gpus", "3")
    assert (code, "cannot be shared out evenly over 3 GPUs" in err) == (2, True), err


def test_from_the_command_line(queue: Queue, call: Call, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert call("pause") == (0, "", "")
    one = ("smoke", "--device", "cpu", "--runs-dir", str(runs))
    code, out, _ = call("add", *one, "--bits", "3", "--json")
    assert json.loads(out) == {"number": 1, "path": str(queue.path), "paused": True}
    assert call("add", *one)[1] == "entry 2 (the queue is paused: eqat queue resume goes on)\n"
    for arguments, expected, words in [
        (("add", "e2e-qp-gain"), 2, "eqat sweep e2e-qp-gain makes them"),
        (("add", "smoke", "--data", "/no/such.txt"), 4, "/no/such.txt: no such file"),
        (("move", "3", "first"), 2, "there is no entry 3"),
        (("move", "2", "middle"), 2, "PLACE: cannot be 'middle' (first, last, up, down, or the number"),
        (("remove",), 2, "names no entry"),
        (("resume", "1x"), 2, "1x"),
        (("list", "--long"), 2, "--long"),
    ]:
        code, _, err = call(*arguments)
        assert (code, words in err, err.count("\n")) == (expected, True, 1), err
    assert call("move", "2", "first") == (0, "", "")
    for place in ("first", "up", "2", "1"):
        assert call("move", "2", place) == (0, "", "entry 2 has that place already\n")
    queue.read()
    assert [(entry.number, entry.bits, entry.run) for entry in queue.entries] == [(2, 4, None), (1, 3, None)]
    assert not list_runs(runs)
    # Their place is gone, and what works on the queue in a process of its own says so of each.
    runs.rmdir()
    assert call("resume")[0] == 0
    wait_until(lambda: states(queue) == ["failed", "failed"] and queue.worker is None)
    assert f"2: {runs}: is not there any more (is its disk mounted?)" in call()[1]
    assert "is not there any more" in queue.log_path.read_text()
    assert call("remove", "--over") == (0, "", "")
    assert call()[1] == "the queue is empty\n"
    assert os.stat(queue.path).st_mode & 0o077 == 0
