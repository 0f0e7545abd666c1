"""Exports and evaluations of a finished run that are killed: what was there stays there, whole."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from pathlib import Path

from engine_runs import Child, exported, output, start, wait_until
from soak_runs import Whole
from soak_tools import Row, die_before_change

from engine.run.directory import RunDirectory
from engine.run.liveness import look, run_state

MOST_CHANGES = 24
"""Of folders, that an export makes at most."""


def soak_task(task: str, whole: Whole, kills: int, seed: int) -> Row:
    """``--task TASK`` on the finished run, killed every time: at a random instant, or just before one of the
    changes that it makes to a folder."""
    row = Row(f"{task} of a finished run, killed")
    run, chance = whole.run, random.Random(f"{task} {seed}")
    duration = _undisturbed(run, task) if kills else 0.0
    while row.struck < kills:
        at_a_change = chance.random() < 0.5
        row.tries += 1
        where = f"seed {seed}, try {row.tries}"
        dies = functools.partial(die_before_change, chance.randint(1, MOST_CHANGES))
        child = start(run, arguments=("--task", task), before=dies if at_a_change else None)
        missing = _watch(run, child, None if at_a_change else chance.uniform(0, duration))
        row.struck += child.code() == -signal.SIGKILL
        # Before anything else: nothing has had the time to mend what is seen here.
        row.check(not missing, f"{where}: for a moment there was no export")
        row.check(_whole_export(run) == whole.export, f"{where}: the export is another one")
        row.check(run_state(run) == "done", f"{where}: the run is {run_state(run)}")
    if kills:
        _undisturbed(run, task)
        row.check(_whole_export(run) == whole.export, "the export after the last kill is another one")
    return row


def _undisturbed(run: RunDirectory, task: str) -> float:
    """Seconds that the task takes."""
    begin = time.monotonic()
    code = start(run, arguments=("--task", task)).code()
    assert code == 0, f"--task {task} ended with {code}; {output(run)}"
    return time.monotonic() - begin


def _watch(run: RunDirectory, child: Child, kill_after: float | None) -> bool:
    """Until the process has ended or was killed: whether the export was missing at any moment."""
    weights = run.export_dir / "gptq_v2" / "model.safetensors"
    wait_until(lambda: look(run).work is not None or not child.alive())
    deadline = None if kill_after is None else time.monotonic() + kill_after
    missing = False
    while child.alive():
        for _ in range(200):  # asking whether it lives costs more than looking
            missing = missing or not _there(weights)
        if deadline is not None and time.monotonic() > deadline:
            child.kill()
            break
    return missing


def _there(path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _whole_export(run: RunDirectory) -> dict[str, str]:
    try:
        return exported(run)
    except (AssertionError, OSError):
        return {}
