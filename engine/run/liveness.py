"""Which state a run is in, and who works on it: :func:`look`, from the lock, the heartbeat and how the event
log ends.

What is done with a finished run (an evaluation, an export, a sample) is a job beside it: the run stays what
it is while an engine does it, and whatever becomes of that.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from pathlib import Path
from typing import Literal, NamedTuple

from engine.run.directory import RunDirectory
from engine.run.event_log import tail_events
from engine.run.events import BULK, AnyEvent, AttemptStarting, Outcome, RunFinished, RunStarted
from engine.run.lock import is_held
from engine.run.status import (
    DEFAULT_GRACE_S,
    Launched,
    Status,
    process_alive,
    read_launched,
    read_status,
)
from engine.run.task import RUN, is_job
from engine.system.guarded import bad_file

State = Literal["created", "starting", "running", "hung", "crashed", "done", "stopped", "failed", "aborted"]
WORKING: tuple[State, ...] = ("starting", "running", "hung")
"""States of a run, or of what is done with it, that an engine works on."""


class Work(NamedTuple):
    """What an engine does with a run at the moment."""

    task: str
    attempt: int
    state: Literal["starting", "running", "hung"]


class Look(NamedTuple):
    """A run at one moment."""

    state: State
    """Of the run itself, whatever is done with it."""
    work: Work | None
    """Who works on it; none where no engine does."""

    @property
    def job(self) -> Work | None:
        """What is being done with the run, where that is not the run itself."""
        return self.work if self.work is not None and is_job(self.work.task) else None


def classify(
    *,
    lock_held: bool,
    heartbeat_age: float | None,
    grace: float,
    finish_outcome: Outcome | None,
    ever_started: bool,
) -> State:
    """The state rule of a run.

    A lock that is held means an engine: alive while its heartbeat is younger than ``grace`` (no heartbeat
    yet counts as young: the lock has only just been taken), hung after. A free lock with a finish event
    for the last attempt gives that outcome; without one the attempt crashed, if there ever was one.
    """
    if lock_held:
        return "hung" if heartbeat_age is not None and heartbeat_age > grace else "running"
    if finish_outcome is not None:
        return finish_outcome
    return "crashed" if ever_started else "created"


def run_state(run: RunDirectory, *, now: float | None = None) -> State:
    """The state of ``run`` now."""
    return look(run, now=now).state


def look(run: RunDirectory, *, now: float | None = None) -> Look:
    """The state of ``run`` now, and who works on it: gathers what :func:`classify` needs."""
    now = time.time() if now is None else now
    held = is_held(run.lock_path)
    events = last_events(run)
    launched = _silent(read_launched(run), events)
    starts = launched is not None and not held and _starting(launched, now)
    held = held or is_held(run.lock_path)  # taken while we looked elsewhere
    status = read_status(run)
    work = _work(run, launched, events, status, now) if held or starts else None
    if work is not None and not held:
        work = work._replace(state="starting")
    if work is not None and not is_job(work.task):
        return Look(work.state, work)
    outcome = _outcome(run, events)
    if launched is not None and not is_job(launched.task):
        # It died before its first event; where the disk had no room for that, its status says how.
        outcome = status.outcome if status is not None and status.attempt == launched.attempt else None
    ever = _size(run.events_path) > 0 or (launched is not None and work is None)
    state = classify(
        lock_held=False, heartbeat_age=None, grace=0.0, finish_outcome=outcome, ever_started=ever
    )
    return Look(state, work)


def _silent(launched: Launched | None, events: list[AnyEvent]) -> Launched | None:
    """An engine that was launched and has not said anything yet."""
    latest = max((event.t for event in events), default=0.0)
    return launched if launched is not None and launched.t > latest else None


def _work(
    run: RunDirectory, launched: Launched | None, events: list[AnyEvent], status: Status | None, now: float
) -> Work:
    """What whoever has the lock, or is about to take it, does."""
    mark = _last_mark(run, events)
    if launched is not None:
        task, attempt = launched.task, launched.attempt
    elif mark is not None:  # with a last word, it has not quite gone
        task, attempt = mark.task, mark.attempt
    else:
        task, attempt = RUN, events[-1].attempt if events else 0
    state = classify(
        lock_held=True,
        heartbeat_age=_heartbeat_age(run, status, now),
        grace=status.grace_s if status is not None else DEFAULT_GRACE_S,
        finish_outcome=None,
        ever_started=True,
    )
    return Work(task, attempt, "hung" if state == "hung" else "running")


def _outcome(run: RunDirectory, events: list[AnyEvent]) -> Outcome | None:
    """How the last attempt ended, or what it left the run as; none for one that was cut off in training."""
    last, newest = _last_mark(run, events), events[-1].attempt if events else 0
    status = read_status(run)
    # A log on a full disk ends before its attempt does, or does not even begin.
    told = status.outcome if status is not None and status.attempt >= newest else None
    if isinstance(last, RunFinished) and last.attempt == newest:
        beyond = status is not None and status.attempt > newest and told is not None
        return told if beyond else last.leaves or last.outcome
    return told or (last.leaves if isinstance(last, RunStarted | AttemptStarting) else None)


def _heartbeat_age(run: RunDirectory, status: Status | None, now: float) -> float | None:
    """Seconds since the last sign of life. Taking the lock is one: the status may be a former attempt's."""
    signs = [status.heartbeat] if status is not None else []
    try:
        signs.append(os.lstat(run.lock_path).st_mtime)
    except OSError:
        pass
    return now - max(signs) if signs else None


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def starting(run: RunDirectory) -> int | None:
    """The pid of an engine that was launched and has not taken the lock or written anything yet, or none."""
    launched = read_launched(run)
    if launched is None or not _starting(launched, time.time()):
        return None
    written = max((event.t for event in last_events(run)), default=0.0)
    return launched.pid if launched.t > written else None


def _starting(launched: Launched, now: float) -> bool:
    if launched.host != socket.gethostname():
        return now - launched.t < DEFAULT_GRACE_S  # cannot be asked from here
    return process_alive(launched.pid, launched.created)


# -- the end of the log --------------------------------------------------------------------------------


def last_events(run: RunDirectory) -> list[AnyEvent]:
    """The end of the run's log; :class:`PreflightError` where there is one that cannot be read."""
    try:
        return tail_events(run.events_path)
    except OSError as error:
        raise bad_file(error, run.events_path) from error


Mark = AttemptStarting | RunStarted | RunFinished
"""Beginnings and ends of attempts."""


def _last_mark(run: RunDirectory, events: list[AnyEvent]) -> Mark | None:
    """The last beginning or end of an attempt, which may lie far before the end of the log, ``events``."""
    found = _marks(events)
    if not found and events:
        # Looked for again at every look at a run that died in a long phase; its log does not change any more.
        found = _marks_of(run.events_path, _size(run.events_path))
    return found[-1] if found else None


def _marks(events: list[AnyEvent]) -> list[Mark]:
    return [event for event in events if isinstance(event, Mark)]


@functools.lru_cache(64)
def _marks_of(log: Path, size: int) -> list[Mark]:
    try:
        return _marks(tail_events(log, lambda found: bool(_marks(found)), skip=BULK))
    except OSError:
        return []
