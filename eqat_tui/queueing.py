"""What is done with the queue: entries are added and put in order, and somebody works on it while there is
work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine.config.run import RunConfig
from engine.errors import EqatError, PreflightError
from engine.plan.plan import make_plan
from engine.run import control
from engine.run.directory import FOLDER_MODE, RunDirectory
from engine.run.finding import check_runs_dir
from engine.run.queue import Entry, Queue, entry_state
from engine.run.shown import summarize
from engine.system.files import disk_error
from engine.system.user_state import machine_name
from eqat_tui.detached import start_detached
from eqat_tui.output import error_fields, one_line, say

START_S = 10.0
"""A process that is to work on the queue says so within this time."""


def added(queue: Queue, config: RunConfig, runs_dir: Path) -> Entry:
    """A new entry. What only its turn can tell (memory, room on the disk) is said, and prevents nothing.

    Raises:
        EqatError: where there is no such model or text, or no run can be made of it anywhere.
    """
    check_runs_dir(runs_dir)
    plan = make_plan(config, runs_dir=runs_dir)
    for problem in plan.problems[:1]:
        say(one_line(f"does not fit now: {problem.where}: {problem.message}; it is tried in its turn"))
    try:
        runs_dir.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, runs_dir) from error
    with queue.changing():
        entry = queue.add(config, runs_dir)
    start_worker(queue)
    return entry


def start_worker(queue: Queue) -> None:
    """Have somebody work on the queue, unless somebody does, it is paused, or there is nothing to do."""
    queue.read()
    if queue.worker is not None or queue.paused or not queue.has_work:
        return
    child = start_detached(["queue", "work"], queue.log_path)
    deadline = time.monotonic() + START_S
    while queue.worker is None and time.monotonic() < deadline:
        code = child.poll()
        if code is not None:
            if code:
                raise PreflightError("nobody can work on it", where="queue", hint=f"see {queue.log_path}")
            return  # it found another at work, or nothing to do
        time.sleep(0.02)


def paused(queue: Queue) -> None:
    """Have no other run begun; the one at work goes on."""
    with queue.changing():
        queue.paused = True


def stopped(queue: Queue) -> RunDirectory | None:
    """Have the run at work stopped, and no other begun; it goes on first when the queue does. The run, if one
    was at work."""
    with queue.changing():
        queue.paused = True
        run = queue.hold()
    if run is not None:
        control.request(run, "stop")
    return run


def resumed(queue: Queue, numbers: Sequence[int] = ()) -> None:
    """Go on with the queue; entries of these numbers have another turn."""
    with queue.changing():
        queue.settle()
        queue.put_back(numbers)
        queue.paused = False
    start_worker(queue)


# -- what is shown -------------------------------------------------------------------------------------


def show_queue(queue: Queue) -> dict[str, Any]:
    """What ``eqat queue list --json`` prints: whether somebody works on it, and its entries in order."""
    rows = [_row(entry) for entry in queue.entries]
    return {
        "machine": machine_name(),
        "path": str(queue.path),
        "log": str(queue.log_path),
        "worker": queue.worker,
        "paused": queue.paused,
        "waiting": sum(row["turn"] == "waiting" for row in rows),
        "entries": rows,
    }


def _row(entry: Entry) -> dict[str, Any]:
    run, turn = entry.directory, entry.place
    row: dict[str, Any] = {
        "number": entry.number,
        "turn": turn,
        "state": entry_state(entry),
        "name": entry.name,
        "model": entry.model,
        "bits": entry.bits,
        "group_size": entry.group_size,
        "runs_dir": entry.runs_dir,
        "added": entry.added,
        "ended": entry.over.t if entry.over is not None else None,
        "run": entry.run if run is not None else None,
        "path": str(run.path) if run is not None else None,
        "summary": None,
        "error": msgspec.to_builtins(entry.error) if entry.error is not None else None,
    }
    if run is None:
        return row
    try:
        row["summary"] = summarize(run)
    except EqatError as error:
        row["error"] = error_fields(error)
    else:
        if row["error"] is None and row["summary"]["error"] and turn == "over":
            row["error"] = {"message": row["summary"]["error"], "where": "", "hint": "", "exit_code": None}
    return row
