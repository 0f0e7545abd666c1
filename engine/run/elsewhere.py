"""Engines on other machines of one file system, where locks may not be seen and processes cannot be asked.

A lock that is seen is believed. Not every file system shows one to other hosts (NFS with ``nolock`` or
``local_lock``, Lustre with ``localflock``), so that a lock which is free proves the end of an engine only on
the machine that it ran on. Of an engine elsewhere the status is the sign of life: a thread of its own writes
it every two seconds, whatever the engine does; one that is not written any more for two minutes has no
process behind it.
"""

from __future__ import annotations

import os
import time

from engine.errors import PreflightError
from engine.run.directory import RunDirectory
from engine.run.lock import is_held
from engine.run.status import Status, read_status
from engine.system import this_machine

SILENT_S = 120.0
"""An engine elsewhere that has written no status for so long is gone. Clocks that differ by less do no
harm."""


def is_elsewhere(status: Status) -> bool:
    """Whether a status was written by a process of another machine. One of this one's name was this one,
    before it was started anew."""
    is_this = status.machine == this_machine.identity() or status.host == this_machine.node()
    return bool(status.machine) and not is_this


def lives_elsewhere(run: RunDirectory, status: Status | None, now: float) -> bool:
    """Whether the engine that wrote ``status`` lives, as far as can be told from another machine than its
    own."""
    if status is None or status.outcome is not None or not is_elsewhere(status):
        return False
    try:
        # By the clock of the file server; a heartbeat is told by the other machine's, and of one thread
        # alone.
        written = os.lstat(run.status_path).st_mtime
    except OSError:
        return False
    return abs(now - written) < SILENT_S


def is_worked_on(run: RunDirectory) -> bool:
    """Whether an engine has the run's lock, or lives elsewhere; without a look at the log."""
    return is_held(run.lock_path) or lives_elsewhere(run, read_status(run), time.time())


def refuse_if_elsewhere(run: RunDirectory) -> None:
    """PreflightError while an engine of another machine works on the run; for one that has the lock here.

    A job that Slurm begins anew is the only one with its number: what it was before is gone, however lately
    that has written something."""
    status = read_status(run)
    if status is None or not lives_elsewhere(run, status, time.time()):
        return
    same = status.job != "" and status.job == this_machine.batch_job()
    if same and this_machine.batch_restarts() > status.restarts:
        return
    raise worked_on_elsewhere(run, status)


def worked_on_elsewhere(run: RunDirectory, status: Status) -> PreflightError:
    """What is said to a second one that wants to work on a run."""
    return PreflightError(
        f"process {status.pid} on {status.host} works on it, or did until a moment ago",
        where=run.id,
        hint=f"eqat attach {run.id} follows it; one that was killed is known to be gone after "
        f"{SILENT_S / 60:.0f} minutes",
    )
