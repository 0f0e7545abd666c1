"""Following a run: what is shown, what Ctrl-C does, and how it ends.

The scripted engine takes the lock, writes events and answers requests as the real one does, in a process of
its own; it just trains nothing, so that each of these takes a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cli_tools import (
    EQAT_WITH_SCRIPTED_ENGINE,
    SCRIPTED_ENGINE,
    Eqat,
    at_work,
    ended,
    environment,
    follows,
    start_eqat,
)
from waiting import PATIENCE, wait_until, waits

from engine.config.derived import resolve
from engine.config.loading import load
from engine.errors import PreflightError
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.finding import list_runs
from engine.run.liveness import run_state
from engine.run.lock import holder
from engine.run.state import RunState, load_state
from engine.run.status import Launched
from engine.system.files import atomic_write_json
from eqat_tui import actions

RUN = ("run", "smoke", "--device", "cpu")
pytestmark = pytest.mark.usefixtures("no_engine_outlives_its_test")


def test_a_run_is_followed_to_its_report(tmp_path: Path) -> None:
    out, err = ended(start_eqat(tmp_path, "finishes", *RUN))
    assert "run 20" in err
    assert "Block-AP [1/1]" in err
    assert "✓ Block-AP: 0.2 s, peak memory 1.00 GiB" in err
    assert "perplexity, Block-AP: 23.67" in err
    assert "23.67" in out
    assert "· done ·" in out


def test_json_of_a_run_is_one_document_on_stdout(tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "finishes", *RUN, "--json")
    out, _ = ended(process)
    shown = json.loads(out)
    assert (shown["state"], process.returncode) == ("done", 0)
    assert shown["perplexity"]["block_ap"] == 23.67


def test_detach_prints_the_id_and_returns_while_the_engine_works(tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "works", *RUN, "--detach")
    out, err = ended(process)
    run = at_work(tmp_path)
    assert (out, err, process.returncode) == (f"{run.id}\n", "", 0)
    assert run_state(run) == "running"


def test_first_interrupt_stops_resumably_and_follows_to_the_end(tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "works", *RUN)
    run = at_work(tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = ended(process)
    assert process.returncode == 75
    assert run_state(run) == "stopped"
    assert "stopping at the next step" in err
    assert f"eqat resume {run.id}" in err
    assert "Traceback" not in err


def test_second_interrupt_aborts(tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "ignores stop", *RUN)
    run = at_work(tmp_path)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: load_state(run).acknowledged)
    process.send_signal(signal.SIGINT)
    _, err = ended(process)
    assert (process.returncode, run_state(run)) == (130, "aborted")
    assert "aborting" in err
    assert f"aborted; nothing was checkpointed yet: eqat resume {run.id} begins anew" in err


def test_of_an_abort_it_is_said_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.create(tmp_path / "runs", resolve(load("smoke")))
    kept = events.CheckpointCommitted(generation=1, bytes=1, seconds=0.1, phase="block_ap", block=0)
    for code in (130, 143):
        actions._tell_end(run, RunState(outcome="aborted", checkpoint=kept), code)
        assert "aborted; what was checkpointed is kept: eqat resume" in capsys.readouterr().err


def test_resume_starts_the_next_attempt_and_does_not_retell_the_first(tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "works", *RUN)
    run = at_work(tmp_path)
    process.send_signal(signal.SIGINT)
    ended(process)
    process = start_eqat(tmp_path, "finishes", "resume", "latest")
    out, err = ended(process)
    assert (process.returncode, load_state(run).attempt) == (0, 2)
    assert "the engine will stop" not in err
    assert "23.67" in out


@pytest.mark.parametrize("command", ["resume", "eval", "export", "generate"])
def test_a_run_that_somebody_works_on_is_refused_with_one_code_whatever_was_wanted(
    tmp_path: Path, command: str
) -> None:
    ended(start_eqat(tmp_path, "works", *RUN, "--detach"))
    run = at_work(tmp_path)
    extra = {"generate": ["--prompt", "x"]}.get(command, [])
    process = start_eqat(tmp_path, "works", command, run.id, *extra)
    _, err = ended(process)
    assert (process.returncode, run_state(run)) == (3, "running"), err
    assert f"eqat attach {run.id} follows it" in err


def test_a_run_whose_engine_is_only_starting_is_not_resumed_with_another_code(tmp_path: Path) -> None:
    """Between the launch of an engine and its lock lie seconds."""
    ended(start_eqat(tmp_path, "works", *RUN, "--detach"))
    run = at_work(tmp_path)
    assert actions.stop(run, abort=False, wait=True) == 0
    with subprocess.Popen(["sleep", "60"]) as engine:
        created = psutil.Process(engine.pid).create_time()
        begun = Launched(pid=engine.pid, host=socket.gethostname(), attempt=2, t=time.time(), created=created)
        atomic_write_json(run.launch_path, begun)
        assert run_state(run) == "starting"
        process = start_eqat(tmp_path, "works", "resume", run.id)
        _, err = ended(process)
        engine.kill()
    assert process.returncode == 3
    assert f"already being worked on by process {engine.pid} (eqat attach {run.id} follows it)" in err


def test_a_failing_run_shows_its_error_and_returns_its_exit_code(tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "fails", *RUN)
    out, err = ended(process)
    assert process.returncode == 4
    assert "error: data.source: too little text (give more)" in err
    assert err.count("error:") == 1, "the error is told once"
    assert out == "", "there is nothing to report"


def test_an_engine_that_is_killed_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "dies", *RUN)
    _, err = ended(process)
    assert process.returncode == 128 + signal.SIGKILL
    assert "SIGKILL" in err
    assert "Fatal: something terrible" in err
    assert run_state(list_runs(tmp_path / "runs")[0]) == "crashed"


def test_an_engine_that_never_gets_to_its_first_event_is_reported_too(tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "dies early", *RUN)
    _, err = ended(process)
    assert process.returncode == 1
    assert "no module named nonsense" in err


def test_attach_follows_and_its_interrupt_leaves_the_run_alone(tmp_path: Path) -> None:
    ended(start_eqat(tmp_path, "works", *RUN, "--detach"))
    run = at_work(tmp_path)
    process = start_eqat(tmp_path, "works", "attach", "latest")
    follows(process)
    process.send_signal(signal.SIGINT)
    _, err = ended(process)
    assert process.returncode == 0
    assert re.match(r"  Block-AP \[1/1\]  block 0 of .*  step \d+/12000  loss ", err)  # where it is, at once
    assert "the engine goes on" in err
    assert run_state(run) == "running"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_whoever_started_the_run_stops_it_resumably(tmp_path: Path, number: int) -> None:
    """In a container or a batch job this process is the one that is told."""
    process = start_eqat(tmp_path, "works", *RUN)
    run = at_work(tmp_path)
    process.send_signal(number)
    _, err = ended(process)
    assert process.returncode == 75
    assert f"eqat resume {run.id}" in err
    assert run_state(run) == "stopped"


def test_a_second_sigterm_aborts_like_a_second_interrupt(tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "ignores stop", *RUN)
    run = at_work(tmp_path)
    process.terminate()
    wait_until(lambda: load_state(run).acknowledged)
    process.terminate()
    _, err = ended(process)
    assert (process.returncode, run_state(run)) == (130, "aborted")
    assert f"eqat resume {run.id}" in err


def test_warnings_of_a_batch_system_and_the_sigterm_after_them_are_one_stop_and_no_abort(
    tmp_path: Path,
) -> None:
    process = start_eqat(tmp_path, "ignores stop", *RUN)
    run = at_work(tmp_path)
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        wait_until(lambda number=number: not waits(process.pid, number))
        wait_until(lambda: load_state(run).acknowledged)
        time.sleep(0.5)  # whether it acts on it a second time shows only in what does not happen
    assert [event.request for event in load_state(run).acknowledged] == ["stop"]
    assert run_state(run) == "running"
    process.terminate()
    _, err = ended(process)
    assert (process.returncode, run_state(run)) == (130, "aborted")
    assert err.count("stopping at the next step") == 1


def test_a_signal_to_a_viewer_leaves_the_run_alone(tmp_path: Path) -> None:
    ended(start_eqat(tmp_path, "works", *RUN, "--detach"))
    run = at_work(tmp_path)
    process = start_eqat(tmp_path, "works", "attach", "latest")
    follows(process)
    process.terminate()
    _, err = ended(process)
    assert process.returncode == 0
    assert "the engine goes on" in err
    assert run_state(run) == "running"


def test_a_full_disk_is_told_while_it_lasts_and_not_of_an_engine_that_is_gone(
    tmp_path: Path, eqat: Eqat
) -> None:
    process = start_eqat(tmp_path, "waits", *RUN)
    run = at_work(tmp_path)
    wait_until(lambda: json.loads(eqat("show", "latest", "--json").stdout)["waiting"])
    assert "paused    the disk is full" in re.sub(" {2,}", "    ", eqat("show", "latest").stdout)
    assert "paused (disk full)" in eqat("runs").stdout
    process.kill()
    pid = holder(run.lock_path)
    assert pid
    os.kill(pid, signal.SIGKILL)
    _, err = ended(process)
    assert err.count("paused: the disk is full") == 1
    wait_until(lambda: run_state(run) == "crashed")
    assert json.loads(eqat("show", "latest", "--json").stdout)["waiting"] is None
    assert f"eqat resume {run.id} goes on where it was" in eqat("show", "latest").stdout
    out, err = ended(start_eqat(tmp_path, "finishes", "resume", "latest"))
    assert "paused" not in err
    assert "23.67" in out


def test_a_hung_engine_is_named_and_can_be_killed_and_the_run_goes_on(tmp_path: Path, eqat: Eqat) -> None:
    ended(start_eqat(tmp_path, "hangs", *RUN, "--detach"))
    run = at_work(tmp_path)
    wait_until(lambda: run_state(run) == "hung")
    follower = start_eqat(tmp_path, "finishes", "attach", "latest", "--plain")
    assert follower.stderr is not None
    told = next(line for line in follower.stderr if "no sign of life" in line)
    assert re.search(rf"\(process {holder(run.lock_path)}\) for \d.* s; still waiting", told)
    asked = eqat("stop", "latest")
    assert asked.returncode == 0
    assert f"eqat stop {run.id} --kill" in asked.stderr
    assert eqat("rm", "latest", "--yes").returncode == 3
    pid = holder(run.lock_path)
    killed = eqat("stop", "latest", "--kill")
    assert (killed.returncode, holder(run.lock_path), run_state(run)) == (0, None, "crashed")
    ended(follower)
    assert f"killed process {pid}" in killed.stderr
    assert f"eqat resume {run.id}" in killed.stderr
    again = start_eqat(tmp_path, "finishes", "resume", "latest")
    ended(again)
    assert again.returncode == 0, "the stop that the hung engine never heard does not stop the next one"
    refused = eqat("stop", "latest", "--kill")
    assert (refused.returncode, "not running" in refused.stderr) == (2, True)


def test_a_process_that_only_has_the_pid_of_the_engine_is_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_run: Callable[[], RunDirectory]
) -> None:
    """The engine's pid in another container, or on another host, is somebody else's here."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(actions, "holder", lambda path: bystander.pid)
    try:
        with pytest.raises(PreflightError, match="cannot be killed from here"):
            actions.kill(new_run())
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize(("umask", "forbidden"), [(0, 0o022), (0o077, 0o077)])
def test_nobody_else_may_write_into_a_run_or_the_folders_made_for_it(
    tmp_path: Path, umask: int, forbidden: int
) -> None:
    command = [sys.executable, "-c", EQAT_WITH_SCRIPTED_ENGINE, SCRIPTED_ENGINE, *RUN]
    done = subprocess.run(
        [*command, "--runs-dir", "deep/er/runs"],
        cwd=tmp_path,
        env=environment(SCRIPT="finishes"),
        capture_output=True,
        umask=umask,
        check=False,
    )
    assert done.returncode == 0
    made = list((tmp_path / "deep").rglob("*"))
    assert len(made) > 12
    for path in (tmp_path / "deep", *made):
        assert not path.stat().st_mode & forbidden, path


@pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux")
def test_a_terminal_that_hangs_up_under_tmux_changes_nothing(tmp_path: Path) -> None:
    """The session is killed while `eqat run` shows the run in it; the real engine goes on to the end."""
    tmux = ["tmux", "-L", f"eqat-hang-up-{os.getpid()}", "-f", "/dev/null"]
    command = shlex.join([sys.executable, "-m", "eqat_tui", *RUN, "--set", "block_ap.epochs=12"])
    subprocess.run(
        [*tmux, "new-session", "-d", "-x", "80", "-y", "24", f"cd {tmp_path} && {command}"],
        env=environment(TERM="xterm-256color"),
        check=True,
    )
    try:
        run = at_work(tmp_path)
        look = [*tmux, "capture-pane", "-p"]
        wait_until(
            lambda: run.id[-4:] in subprocess.run(look, capture_output=True, text=True, check=True).stdout
        )
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    wait_until(lambda: run_state(run) != "running", seconds=2 * PATIENCE)  # a whole training
    assert run_state(run) == "done"
    assert [event.attempt for event in load_state(run).exports.values()] == [1]


def test_stop_and_wait_returns_when_the_engine_is_gone_and_attach_exits_as_the_run(
    tmp_path: Path, eqat: Eqat
) -> None:
    ended(start_eqat(tmp_path, "works", *RUN, "--detach"))
    run = at_work(tmp_path)
    watcher = start_eqat(tmp_path, "works", "attach", "latest")
    follows(watcher)
    stopped = eqat("stop", "latest", "--wait")
    assert (stopped.returncode, run_state(run)) == (0, "stopped")
    ended(watcher)
    assert watcher.returncode == 75


def test_closing_the_terminal_does_not_end_the_run(tmp_path: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have been told to ignore it
        command = [sys.executable, "-c", EQAT_WITH_SCRIPTED_ENGINE, SCRIPTED_ENGINE, *RUN]
        os.execve(sys.executable, command, environment(SCRIPT="works", TERM="xterm-256color"))
    run = at_work(tmp_path)
    os.close(terminal)  # the kernel sends SIGHUP to whoever the terminal belonged to
    _, how = os.waitpid(child, 0)
    assert how != 0
    before = load_state(run).step or 0
    wait_until(lambda: (load_state(run).step or 0) > before + 5)
    assert run_state(run) == "running"


def terminal_output(where: Path, **extra: str) -> str:
    """All that a terminal gets from a run that finishes."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", EQAT_WITH_SCRIPTED_ENGINE, SCRIPTED_ENGINE, *RUN],
        cwd=where,
        env=environment(SCRIPT="finishes", **extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=end,
    )
    os.close(end)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while chunk := os.read(terminal, 65536):
            seen += chunk
    os.close(terminal)
    assert process.wait(timeout=PATIENCE) == 0
    return seen.decode()


def test_a_terminal_gets_a_live_display_that_restores_the_cursor(tmp_path: Path) -> None:
    seen = terminal_output(tmp_path, TERM="xterm-256color")
    assert "block 0 of 0–3" in seen
    assert "tokens/s" in seen
    assert "1:30 left" in seen
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") >= 1  # cursor hidden, cursor shown
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")


def test_no_color_means_no_colour(tmp_path: Path) -> None:
    seen = terminal_output(tmp_path, TERM="xterm-256color", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*[34][0-9][;m]", seen)


def test_without_a_terminal_there_are_no_control_codes(tmp_path: Path) -> None:
    out, err = ended(start_eqat(tmp_path, "finishes", *RUN, FORCE_COLOR="1"))
    assert "\x1b" not in out + err
    assert "\r" not in out + err
