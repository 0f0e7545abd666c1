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

from engine.errors import PreflightError
from engine.run import slurm
from engine.run.directory import RunDirectory
from engine.run.elsewhere import is_elsewhere, lives_elsewhere
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
from engine.run.submitted import Submitted, read_submitted
from engine.run.task import RUN, is_job
from engine.system import this_machine
from engine.system.guarded import bad_file

State = Literal[
    "created", "waiting", "starting", "running", "hung", "crashed", "done", "stopped", "failed", "aborted"
]
WORKING: tuple[State, ...] = ("waiting", "starting", "running", "hung")
"""States of a run, or of what is done with it, that an engine works on, or that waits for a cluster to start
one."""


class Work(NamedTuple):
    """What an engine does with a run at the moment."""

    task: str
    attempt: int
    state: Literal["waiting", "starting", "running", "hung"]


class BatchJob(NamedTuple):
    """A job of Slurm's."""

    job: str
    state: str
    """In Slurm's words; empty where it could not be asked."""
    reason: str
    """Why it waits."""
    node: str


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
    away = not held and _is_away(run, launched, events, status, now)
    work = _work(run, launched, events, status, now) if held or away or starts else None
    if work is not None and not (held or away):
        work = work._replace(state="starting")
    if work is None:
        work = _in_a_batch(run, events, status)
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


def _is_away(
    run: RunDirectory, launched: Launched | None, events: list[AnyEvent], status: Status | None, now: float
) -> bool:
    """Whether an engine of another machine works on the run, whose lock is not seen here."""
    if status is None or not lives_elsewhere(run, status, now):
        return False
    newest = max((event.attempt for event in events), default=0)
    begun = launched.attempt if launched is not None else 0
    if status.attempt < max(newest, begun):
        return False  # what a former attempt has left
    mark = _last_mark(run, events)
    if isinstance(mark, RunFinished) and mark.attempt == status.attempt:
        return False
    submitted = read_submitted(run) if status.job else None
    if submitted is None or submitted.job != status.job:
        return True
    _, job = _asked(run, submitted)  # Slurm knows sooner than silence does
    return job is None or job.kind != "over"


def _in_a_batch(run: RunDirectory, events: list[AnyEvent], status: Status | None) -> Work | None:
    """What a cluster's job is going to do with a run that no engine is seen to work on."""
    submitted = read_submitted(run)
    if submitted is None:
        return None
    newest = max((event.attempt for event in events), default=0)
    unheard = max((event.t for event in events), default=0.0) < submitted.t
    outcome = _outcome(run, events) if events else None
    if outcome == "done" and not unheard:
        return None  # Slurm need not be asked
    stopped = outcome in (None, "stopped")
    could_ask, job = _asked(run, submitted)
    if not could_ask:  # what was written down is all that is known
        return Work(RUN, newest + 1, "waiting") if unheard or (submitted.returns and stopped) else None
    if job is None or job.kind == "over":
        return None
    if job.kind == "waiting" or (submitted.returns and stopped):
        return Work(RUN, newest + 1, "waiting")
    if unheard:
        return Work(RUN, newest + 1, "starting")
    # It was heard of, says nothing any more, and its job is not over: on a machine that cannot be asked it
    # hangs.
    cut_off = status is not None and is_elsewhere(status) and status.job == submitted.job
    return Work(RUN, newest, "hung") if cut_off and outcome is None else None


def _asked(run: RunDirectory, submitted: Submitted) -> tuple[bool, slurm.Job | None]:
    """Whether Slurm could be asked, and the run's job as Slurm sees it."""
    try:
        owner = run.path.stat().st_uid
    except OSError:  # deleted just now
        return True, None
    return slurm.known(submitted, owner)


def batch_job(run: RunDirectory, work: Work | None) -> BatchJob | None:
    """The job of Slurm's that works on the run, or is going to; none where none does."""
    if work is None or is_job(work.task):
        return None
    status = read_status(run)
    if work.state in ("running", "hung") and status is not None and status.attempt >= work.attempt:
        return BatchJob(status.job, "RUNNING", "", status.host) if status.job else None
    submitted = read_submitted(run)
    if submitted is None:
        return None
    _, job = _asked(run, submitted)
    if job is None:
        return BatchJob(submitted.job, "", "", "")
    return BatchJob(job.id, job.state, job.reason if job.kind == "waiting" else "", job.node)


def refuse_waiting(run: RunDirectory) -> None:
    """PreflightError where a job of Slurm's waits to work on the run; for anybody but that job."""
    submitted = read_submitted(run)
    if submitted is None or submitted.job == this_machine.batch_job():
        return
    work = _in_a_batch(run, last_events(run), read_status(run))
    if work is not None and work.state == "waiting":
        raise PreflightError(
            f"Slurm's job {submitted.job} waits to work on it",
            where=run.id,
            hint=f"eqat stop {run.id} takes the job out of Slurm",
        )


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
