"""Why an engine is gone that has not said so."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import wait_until

from engine.errors import EqatError
from engine.run import events, launch
from engine.run.deaths import KILLED, why_gone
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.liveness import run_state
from engine.run.lock import already_worked_on
from engine.run.shown import show_run
from engine.run.state import load_state
from engine.run.status import Status, write_status
from eqat_tui.feed import LiveFeed
from eqat_tui.lines import plain
from eqat_tui.run_text import report
from eqat_tui.views import monitor

TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n'


def printed(run: RunDirectory, text: str, attempt: int = 1) -> None:
    launch.log_path(run, attempt).write_text(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", KILLED),
        ("some library says hello\n", KILLED),
        (f"{TRACEBACK}OSError: [Errno 28] No space left on device: 'x'\n", "the disk is full"),
        (f"{TRACEBACK}SafetensorError: Error: I/O error: No space left on device (os error 28)\n", "is full"),
        (f"{TRACEBACK}OSError: [Errno 122] Disk quota exceeded\n", "your quota"),
        (f"{TRACEBACK}OSError: [Errno 30] Read-only file system: 'x'\n", "can only be read"),
        (f"{TRACEBACK}MemoryError\n", "ran out of host memory"),
        (f"{TRACEBACK}torch.OutOfMemoryError: CUDA out of memory. Tried to\n", "ran out of GPU memory"),
        (f"{TRACEBACK}ModuleNotFoundError: No module named 'torch'\n", "No module named 'torch'"),
        ("Fatal Python error: Bus error\n\nThread 0x1:\n", "Bus error"),
        ("error: model.source: is gone (choose another)\n", "model.source: is gone"),
        (
            "error: runs/x: the run is already being worked on by process 7 (eqat attach x follows it)\n",
            KILLED,
        ),
    ],
)
def test_the_end_of_its_log_says_why(run: RunDirectory, text: str, words: str) -> None:
    printed(run, text)
    found = why_gone(run, 1)
    assert words in found
    assert "\n" not in found
    assert (found == KILLED) == (words == KILLED)


def test_of_a_second_engine_it_is_said_that_the_first_was_at_work(run: RunDirectory) -> None:
    printed(run, f"error: {already_worked_on(7, str(run.path), run.id)}\n")
    assert "already being worked on by process 7" in why_gone(run, 1, code=3)
    assert why_gone(run, 1, code=-9) == KILLED, "the log is that of another engine"


def test_its_status_says_it_where_the_log_had_no_room(run: RunDirectory) -> None:
    write_status(run, Status(attempt=2, outcome="failed", exit_code=7, failure="the disk is full"))
    assert why_gone(run, 2) == "the disk is full"
    assert why_gone(run, 1) == KILLED, "of another attempt"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGKILL, KILLED),
        (-signal.SIGBUS, "SIGBUS"),
        (-99, "signal 99"),
        (7, "the disk is full"),
        (6, "out of memory"),
        (1, KILLED),
        (42, KILLED),
    ],
)
def test_how_its_process_ended_says_something(run: RunDirectory, code: int, words: str) -> None:
    assert words in why_gone(run, 1, code=code)


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        ({"f_bavail": 0}, "the disk is full"),
        ({"f_favail": 0}, "no room for another file"),
        ({"f_flag": os.ST_RDONLY}, "can only be read"),
        ({}, KILLED),
    ],
)
def test_its_disk_says_why_nothing_was_said(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, disk: dict[str, int], words: str
) -> None:
    found = SimpleNamespace(**{"f_bavail": 9, "f_favail": 9, "f_files": 9, "f_flag": 0, **disk})
    monkeypatch.setattr(os, "statvfs", lambda place: found)
    assert words in why_gone(run, 1)
    assert why_gone(run, 1, latest=False) == KILLED, "what the disk is like now is no news of long ago"


def test_whoever_looks_is_told_why_and_of_no_checkpoint_that_is_not_there(run: RunDirectory) -> None:
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(events.AttemptStarting(pid=1, host="h"))
    printed(run, f"{TRACEBACK}OSError: [Errno 28] No space left on device\n")
    assert run_state(run) == "crashed"
    view = LiveFeed(run).poll()
    said = " ".join(plain(row) for row in monitor.notices(view, 200))
    assert "the disk is full" in said
    assert "killed" not in said
    assert "checkpoint" not in said
    assert "the disk is full" in view.journal[-1].text
    assert "engine died the disk is full" in " ".join(report(show_run(run)).split())
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(events.CheckpointCommitted(generation=1, bytes=1, seconds=1.0, phase="block_ap"))
    said = " ".join(plain(row) for row in monitor.notices(LiveFeed(run).poll(), 200))
    assert "last checkpoint" in said


# -- a disk that is really full ------------------------------------------------------------------------


@pytest.fixture
def on_a_small_disk(run: RunDirectory, tmp_path: Path) -> Iterator[Callable[[], RunDirectory]]:
    """``on_a_small_disk()``: a run on a disk of its own, of 300 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own can only be mounted by root")

    yield lambda: RunDirectory.create(disk / "runs", run.config())
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(place: Path) -> None:
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(512)):
            pass


def test_an_engine_is_not_started_where_it_could_not_even_say_why_it_ends(
    on_a_small_disk: Callable[[], RunDirectory],
) -> None:
    run = on_a_small_disk()
    fill(run.path.parents[1])
    with pytest.raises(EqatError, match="the disk is full") as caught:
        launch.launch(run)
    assert caught.value.exit_code == 7
    assert run_state(run) == "created"


def test_a_disk_that_is_full_when_an_engine_starts_is_what_everybody_is_told(
    on_a_small_disk: Callable[[], RunDirectory],
) -> None:
    """The log of events has no room for a word; its status was there, and is overwritten."""
    run = on_a_small_disk()
    write_status(run, Status(heartbeat=time.time(), attempt=0))
    fill(run.path.parents[1])
    pid = launch.launch(run, args=("--set", "runtime.device=cpu"), python=sys.executable)
    wait_until(lambda: launch.exit_code(pid) is not None)
    assert launch.exit_code(pid) in (3, 7)
    assert run_state(run) == "failed"
    error = load_state(run).error
    assert error is not None
    assert "disk" in error.message or "room" in error.message or "free" in error.message, error
    said = " ".join(plain(row) for row in monitor.notices(LiveFeed(run).poll(), 200))
    assert error.message in said
    assert "killed" not in said
