"""What an engine says of itself: ``launch.json`` before its first event, then ``status.json``."""

from __future__ import annotations

import os

import msgspec

from engine.errors import EqatError, ExitCode
from engine.run.directory import RunDirectory
from engine.run.events import Outcome
from engine.run.lock import holder
from engine.system import this_machine
from engine.system.files import atomic_write_json, overwrite_in_place
from engine.system.guarded import BadFile, read_struct

DEFAULT_GRACE_S = 120.0
"""A heartbeat older than this means a hung engine, unless its status asks for more patience."""

LONGEST_FAILURE = 500
"""Letters of an error in the status file, which has to fit into the place of the one before."""

PLAN_COUNTS = 0.1
"""What was measured of a run says little about the time left while it is short: the plan is believed as if it
were a measurement of this part of the run."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """``status.json``: where the engine is now. Bytes and seconds; ``heartbeat`` is wall clock time."""

    phase: str = ""
    block: int | None = None
    blocks: int | None = None
    step: int | None = None
    steps: int | None = None
    doing: str = ""
    """What it does where nothing can be counted (``loading torch``), in words; empty elsewhere."""
    phase_s: float | None = None
    """Seconds that this attempt has worked on the phase, or has been starting."""
    eta_s: float | None = None
    eta_measured: bool = True
    """Whether the time left rests on this phase's own pace, and not only on the plan."""
    over_s: float | None = None
    """Seconds by which a phase in which nothing can be counted outlasts what was planned for it."""
    heartbeat: float = 0.0
    grace_s: float = DEFAULT_GRACE_S
    """How long the engine may be silent now; a step that takes minutes raises it beforehand."""
    pid: int = 0
    """The engine; :func:`write_status` fills it in, with what follows."""
    host: str = ""
    """What users call its machine: a cluster's node, or a host."""
    machine: str = ""
    """Tells its machine from others (:mod:`engine.system.this_machine`)."""
    job: str = ""
    """The job of Slurm's that it belongs to; empty outside of one."""
    restarts: int = 0
    """How often that job was begun before."""
    attempt: int = 1
    events_dropped: int = 0
    waiting: str = ""
    """Why the engine does nothing at the moment (a full disk), in one sentence; empty while it works."""
    outcome: Outcome | None = None
    """What the run is since this attempt has ended. The log says so too, unless the disk had no room for it:
    a status is written in the place of the one before."""
    exit_code: int | None = None
    failure: str = ""
    """Why the attempt failed, in one line."""


class Launched(msgspec.Struct, frozen=True, kw_only=True):
    """``launch.json``: the last engine that was started, before it has written anything itself."""

    pid: int
    host: str
    attempt: int
    t: float
    created: float
    """When the operating system says the process began, so that a reused pid is not taken for it."""
    task: str = "run"
    """What it does: ``run``, or something with a finished run."""


def write_status(run: RunDirectory, status: Status) -> bool:
    """Replace ``status.json``. A heartbeat must not end a run, so a failure is only returned as False.

    A full disk has no room for a new file, but the old one's place is there: without a heartbeat a run that
    waits for room would seem to hang.
    """
    if not status.machine:
        status = msgspec.structs.replace(
            status,
            pid=status.pid or os.getpid(),
            host=this_machine.node(),
            machine=this_machine.identity(),
            job=this_machine.batch_job(),
            restarts=this_machine.batch_restarts(),
        )
    try:
        atomic_write_json(run.status_path, status)
    except EqatError as error:
        return error.exit_code == ExitCode.DISK_FULL and overwrite_in_place(
            run.status_path, msgspec.json.encode(status)
        )
    except OSError:
        return False
    return True


def read_status(run: RunDirectory) -> Status | None:
    """The last status, or none where there is none that can be read.

    Only the engine that wrote it can be waiting: what a dead one, or a former attempt's, waited for is over.
    """
    try:
        status = read_struct(run.status_path, Status)
    except BadFile:
        return None
    if status.waiting and not _written_by_holder(run, status):
        return msgspec.structs.replace(status, waiting="")
    return status


def _written_by_holder(run: RunDirectory, status: Status) -> bool:
    """Whether a status comes from the engine that holds the lock: it is of that process, and taking the lock
    renews the file's time, a moment later. A lock on another machine may not be seen; what that one's engine
    wrote, it wrote while it had it."""
    if status.machine and status.machine != this_machine.identity():
        return status.outcome is None
    pid = holder(run.lock_path)
    if pid is None or pid not in (0, status.pid):
        return False
    try:
        return status.heartbeat >= os.lstat(run.lock_path).st_mtime
    except OSError:
        return False


def read_launched(run: RunDirectory) -> Launched | None:
    """Who was started last, or none."""
    try:
        return read_struct(run.launch_path, Launched)
    except BadFile:
        return None


def process_alive(pid: int, created: float) -> bool:
    """Whether the process that began at ``created`` still runs; a zombie or a reused pid does not."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < 2.0
    except (psutil.Error, ValueError, OverflowError):  # a number that is no process's
        return False
