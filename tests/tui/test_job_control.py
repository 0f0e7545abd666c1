"""Ctrl-Z, fg, bg and signals that do the same: afterwards the whole screen is there, at the present size."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from logs import LiveEngine, make_run
from pty_app import PtyApp
from tmux_app import Tmux
from waiting import handles, stands_still, wait_until

from engine.run.liveness import run_state
from eqat_tui import job_control

RUN = "20251124-1600-tiny-llama-w4g32-0001"
ALTERNATE, LEAVES_ALTERNATE = b"\x1b[?1049h", b"\x1b[?1049l"
SHOWS_CURSOR, HIDES_CURSOR = b"\x1b[?25h", b"\x1b[?25l"
EVERYWHERE = ("eqat", "GPU", "host", "cores", "disk", "processes", "palette")
"""Words from the first line of the memory screen to its last."""


def fills(screen: str, rows: int) -> bool:
    """Whether the app's last line is the last of a terminal of ``rows``."""
    lines = screen.rstrip("\n").splitlines()
    return len(lines) == rows and lines[-1].rstrip().endswith("q quit")


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    if shutil.which("tmux") is None or shutil.which("bash") is None:
        pytest.skip("needs tmux and bash")
    terminal = Tmux(tmp_path)
    terminal.socket += "-jobs"
    yield terminal
    terminal("kill-server")


def test_fg_and_ctrl_l_show_the_whole_screen_again(tmux: Tmux) -> None:
    """In the app and in a dialog, and also where the terminal was resized meanwhile."""
    tmux.open_for("bash", "--norc")
    tmux.type(f"{sys.executable} -m eqat_tui memory")
    tmux.press("Enter")

    def whole(screen: str) -> bool:
        return all(word in screen for word in EVERYWHERE)

    tmux.until(whole)
    tmux.press("C-z")
    tmux.sees("Stopped")
    tmux.type("clear; fg")
    tmux.press("Enter")
    tmux.until(whole)
    tmux.press("C-z")
    tmux.sees("Stopped")
    tmux.resize(100, 30)
    tmux.type("fg")
    tmux.press("Enter")
    # What it draws first may be of the size before: a terminal tells of a new one a moment later.
    tmux.until(lambda screen: whole(screen) and fills(screen, 30))

    tmux.scribble("\x1b[H\x1b[2Jsomebody else's words")
    tmux.press("C-l")
    tmux.until(lambda screen: whole(screen) and "somebody else" not in screen)

    tmux.press("?")
    tmux.sees("Memory: keys")
    tmux.scribble("\x1b[H\x1b[2Jsomebody else's words")
    tmux.press("C-l")
    tmux.until(lambda screen: "Memory: keys" in screen and "somebody else" not in screen)
    tmux.press("C-z")
    tmux.sees("Stopped")
    tmux.type("clear; fg")
    tmux.press("Enter")
    tmux.sees("Memory: keys")
    tmux.press("Escape", "h")  # it hears keys, each once
    tmux.sees("held")


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGSTOP])
def test_stopped_and_continued_from_outside_the_app_draws_everything(number: int, tmp_path: Path) -> None:
    with PtyApp(["memory"], cwd=tmp_path) as app:
        app.sees(b"palette")
        app.settle()
        wait_until(lambda: handles(app.pid, signal.SIGCONT))
        before = len(app.output)
        os.kill(app.pid, number)
        wait_until(lambda: stands_still(app.pid))
        app.read(0.2)
        assert (LEAVES_ALTERNATE in app.output[before:]) == (number == signal.SIGTSTP)
        app.resize((100, 30))
        before = len(app.output)
        os.kill(app.pid, signal.SIGCONT)
        app.sees(b"palette")
        app.settle()
        drawn = app.output[before:]
        assert drawn.rindex(ALTERNATE) < drawn.rindex(b"palette")
        for word in EVERYWHERE:
            assert word.encode() in drawn[drawn.rindex(ALTERNATE) :]
        app.type("h")
        app.sees(b"held")
        app.type("q")
        assert app.end() == 0


def test_where_no_shell_waits_ctrl_z_says_so_and_does_not_stop(tmp_path: Path) -> None:
    """As with ``ssh -t host eqat``: nobody could say ``fg``."""
    with PtyApp(["memory"], cwd=tmp_path) as app:
        app.sees(b"palette")
        app.settle()
        app.type("\x1a")
        app.sees(b"no shell waits")
        assert not stands_still(app.pid)


def test_who_follows_a_run_gives_the_terminal_back_and_goes_on_with_fresh_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None, name=RUN)
    with LiveEngine(run), PtyApp(["attach", RUN, "--plain"], cwd=tmp_path) as app:
        app.sees(b"Block-AP")
        wait_until(lambda: handles(app.pid, signal.SIGTSTP))
        for number in (signal.SIGTSTP, signal.SIGSTOP):
            before = len(app.output)
            os.kill(app.pid, number)
            # Nobody could say `fg` to a program that a terminal was opened for: the kernel lets it go on.
            wait_until(lambda since=before: stands_still(app.pid) or SHOWS_CURSOR in _read(app, since))
            if number == signal.SIGTSTP:
                assert SHOWS_CURSOR in app.output[before:]
            os.kill(app.pid, signal.SIGCONT)
            app.read(0.2)
            before = len(app.output)
            app.sees(b"Block-AP")
            app.settle(silence=0.1, seconds=1.0)
            assert b"block 3 of" in app.output[before:]
        assert run_state(run) == "running"


def _read(app: PtyApp, since: int) -> bytes:
    app.read(0.05)
    return app.output[since:]


def test_a_leader_of_its_session_has_no_shell_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpgrp", os.getpid)
    monkeypatch.setattr(os, "getpgid", lambda pid: 7)
    monkeypatch.setattr(os, "getsid", lambda pid: pid)
    assert not job_control.shell_waits()  # its parent is of another session
    monkeypatch.setattr(os, "getsid", lambda pid: 1)
    assert job_control.shell_waits()
