"""Ends that nobody planned: the terminal is left as it was found, and the run goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from logs import LiveEngine, make_run
from pty_app import PtyApp

from engine.run.liveness import run_state

LEAVES_ALTERNATE_SCREEN = b"\x1b[?1049l"
SHOWS_CURSOR = b"\x1b[?25h"
MOUSE_OFF = b"\x1b[?1000l"
RUN = "20251124-1600-tiny-llama-w4g32-0001"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_clean_and_the_run_alone(number: int, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None, name=RUN)
    with LiveEngine(run), PtyApp(["attach", run.id], cwd=tmp_path) as app:
        app.sees(b"Block-AP")
        app.signal(number)
        assert app.end() == 128 + number
        app.rest()
        for sequence in (LEAVES_ALTERNATE_SCREEN, SHOWS_CURSOR, MOUSE_OFF):
            assert sequence in app.output
        assert f"eqat attach {run.id[-4:]} shows it again".encode() in app.output
        assert run_state(run) == "running"


def test_quitting_says_how_to_come_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None, name=RUN)
    with LiveEngine(run), PtyApp(["attach", run.id], cwd=tmp_path) as app:
        app.sees(b"Block-AP")
        app.type("q")
        assert app.end() == 0
        app.rest()
        assert LEAVES_ALTERNATE_SCREEN in app.output
        assert f"{run.id} goes on;".encode() in app.output


def test_several_viewers_watch_the_same_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None, name=RUN)
    with (
        LiveEngine(run),
        PtyApp(["attach", run.id], cwd=tmp_path) as one,
        PtyApp(["attach", run.id, "--read-only"], cwd=tmp_path, size=(60, 20)) as other,
    ):
        for viewer in (one, other):
            viewer.sees(b"Block-AP")


def test_every_size_and_every_resize_is_survived(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None, name=RUN)
    with LiveEngine(run), PtyApp(["attach", run.id], cwd=tmp_path) as app:
        app.sees(b"Block-AP")
        for key in "12345":
            app.type(key)
            for size in ((200, 50), (60, 20), (20, 5), (1, 1), (300, 100), (80, 24)):
                app.resize(size)
                app.read(0.12)
        app.settle()
        app.type("2")
        app.sees(b"Block-AP")
        app.type("q")
        assert app.end() == 0


@pytest.mark.parametrize("command", [["replay", RUN], ["memory"], ["monitor"]])
def test_what_needs_a_terminal_says_so_in_one_line(command: list[str], tmp_path: Path) -> None:
    import subprocess
    import sys

    from pty_app import REPOSITORY

    make_run(tmp_path / "runs", None, name=RUN)
    done = subprocess.run(
        [sys.executable, "-m", "eqat_tui", *command],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "needs a terminal" in done.stderr
