"""``eqat attach HOST:RUN`` over a real ssh to a real sshd on the loopback, where one can be started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cli_tools import at_work, ended, environment, start_eqat
from remote_tools import EQAT_THERE, Sshd, sshd
from waiting import wait_until

from engine.run.directory import RunDirectory
from engine.run.finding import list_runs
from engine.run.liveness import run_state
from engine.run.lock import holder
from eqat_tui.feed import LiveFeed
from eqat_tui.remote import mirror as mirrors
from eqat_tui.remote.mirror import attached
from eqat_tui.remote.ssh import Destination, options_of


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    with sshd(tmp_path / "sshd") as found:
        if isinstance(found, str):
            pytest.skip(f"needs an sshd that this user can start: {found}")
        yield found
    for run in list_runs(tmp_path / "runs"):
        pid = holder(run.lock_path)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


def works(where: Path) -> RunDirectory:
    ended(start_eqat(where, "works", "run", "smoke", "--device", "cpu", "--detach"))
    return at_work(where)


def sessions(server: Sshd) -> list[psutil.Process]:
    """The processes of sshd that have a connection each."""
    return psutil.Process(server.server.pid).children()


def test_a_real_run_is_followed_over_a_real_ssh_to_its_report(server: Sshd, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "eqat_tui", "run", "smoke", "--device", "cpu", "--detach"],
        cwd=tmp_path,
        env=environment(),
        check=True,
        capture_output=True,
    )
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "eqat_tui", "attach", f"{server.host}:latest"),
            *("--ssh-option", server.options, "--remote-command", EQAT_THERE),
            *("--runs-dir", str(tmp_path / "runs")),
        ],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = ended(process)
    run = list_runs(tmp_path / "runs")[0]
    assert (process.returncode, run_state(run)) == (0, "done"), err
    assert f"{server.host}:{run.path}" in out
    assert "E2E-QP" in err


def test_a_real_connection_is_cut_and_made_again_and_a_stop_is_passed_on(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = works(tmp_path)
    monkeypatch.setattr(mirrors, "PAUSES_S", (0.0,))
    destination = Destination(server.host, options_of([server.options]), EQAT_THERE)
    with attached(destination, str(run.path)) as found:
        feed = LiveFeed(found)
        for _ in range(3):
            assert feed.poll().liveness == "running"
            step = feed.poll().state.step or 0
            for session in sessions(server):
                session.kill()  # without a goodbye, as a network would
            wait_until(lambda before=step: (feed.poll().state.step or 0) > before + 5)
        found.sight.ask("stop")
        wait_until(lambda: feed.poll().liveness == "stopped")
        assert feed.poll().state == LiveFeed(run).poll().state
        here, there = found.events_path.read_bytes(), run.events_path.read_bytes()
        assert here == there
    wait_until(lambda: not sessions(server))  # nobody is left behind over there


def test_a_key_that_is_not_taken_is_one_line(server: Sshd, tmp_path: Path) -> None:
    (tmp_path / "sshd" / "keys").write_text("")
    process = subprocess.Popen(
        [sys.executable, "-m", "eqat_tui", "attach", f"{server.host}:latest", "--ssh-option", server.options],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _, err = ended(process)
    assert process.returncode == 3
    assert err.count("\n") == 1
    assert "cannot be reached: " in err
    assert "Permission denied (publickey)" in err
