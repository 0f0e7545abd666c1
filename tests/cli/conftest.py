"""What the tests of the command line share: running it, and runs to look at."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_tools import Eqat, environment, story
from waiting import PATIENCE

from engine.config.derived import resolve
from engine.config.loading import load
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.finding import list_runs
from engine.run.lock import holder


@pytest.fixture
def eqat(tmp_path: Path) -> Eqat:
    """Run ``eqat ARGUMENTS`` in ``tmp_path`` and return what it printed and its exit code."""

    def call(*arguments: str, timeout: float = PATIENCE, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "eqat_tui", *arguments],
            cwd=tmp_path,
            env=environment(**extra),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return call


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[[], RunDirectory]:
    """Make a run of the smoke preset that was never started."""
    return lambda: RunDirectory.create(tmp_path / "runs", resolve(load("smoke")))


@pytest.fixture
def no_engine_outlives_its_test(tmp_path: Path) -> Iterator[None]:
    """Kill the engines of runs in ``tmp_path`` that a test has left at work."""
    yield
    for run in list_runs(tmp_path / "runs"):
        pid = holder(run.lock_path)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def finished_run(new_run: Callable[[], RunDirectory]) -> RunDirectory:
    """A run with the log of one that went well."""
    run = new_run()
    with EventWriter(run.events_path, 1) as writer:
        for event in story(run):
            writer.emit(event)
    return run
