"""Where the app's screens get a run from: the live one on disk, or a finished one replayed.

A feed turns files into a :class:`RunView`, everything that a screen may show of a run at one moment. It only
reads, so any number of viewers may follow a run, and it never raises for what a file holds: a directory that
vanished or a log that cannot be read is a view too. :meth:`LiveFeed.poll` reads what is new since the last
time and is called on a thread, because a network file system may hang.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from engine import __version__
from engine.config.writing import to_dict
from engine.errors import EqatError
from engine.run import control, events
from engine.run.deaths import KILLED, why_gone
from engine.run.directory import RunDirectory
from engine.run.event_log import EventFollower, read_events
from engine.run.events import AnyEvent
from engine.run.liveness import WORKING, State, Work
from engine.run.shown import place_of
from engine.run.sight import sight_of
from engine.run.state import RunState
from engine.run.status import Status, read_launched
from engine.run.task import is_job
from eqat_tui.journal import Entry, Journal, silent_words
from eqat_tui.log_tail import log_tail
from eqat_tui.output import cell, error_words, one_line
from eqat_tui.run_text import batch_words

Liveness = State | Literal["gone"]
"""A run's state, and one that only whoever looks sees: its folder is gone."""
LONGEST_PAUSE_S = 2.0
"""A replay passes over longer silences: a run that was resumed the next day need not be waited for."""


class RunView(msgspec.Struct, frozen=True, kw_only=True):
    """A run at one moment."""

    id: str
    path: str
    state: RunState
    liveness: Liveness
    """Of the run itself, whatever is done with it."""
    now: float
    job: Work | None = None
    """What an engine does with the finished run at the moment, where one does; ``state.job`` says how far it
    is, and afterwards how it ended."""
    config: Mapping[str, Any] | None = None
    journal: tuple[Entry, ...] = ()
    requests: tuple[control.Request, ...] = ()
    """What was asked of the engine and not acknowledged yet."""
    why_gone: str = ""
    """Why an engine that said nothing is gone, of the run or of what was done last with it."""
    log_tail: tuple[str, ...] = ()
    """The end of the engine's output, where it died or gives no sign of life."""
    pid: int | None = None
    """The engine, while there is one."""
    problem: str = ""
    """Why some of this cannot be read."""
    replay: Replay | None = None
    place: str = ""
    """Where a run is that is not at work on this machine: ``in Slurm as job 123_4``, ``on n1``."""
    launched: float | None = None
    """When the engine was started, while it has not said anything yet."""
    host: str = ""
    """The other machine that the run is on, as it was named to get there; empty for one of this machine."""
    trouble: str = ""
    """Why the machine of the run cannot be seen now; then all of this is of when it was seen last."""

    @property
    def live(self) -> bool:
        """Whether an engine works on it or with it, or is about to."""
        return self.job is not None or self.liveness in WORKING

    @property
    def at_work(self) -> RunState:
        """Where the engine is: in the run, or in what is done with it."""
        return self.state.at_work if self.job is not None else self.state

    @property
    def hung(self) -> bool:
        """Whether an engine works on it or with it and gives no sign of life."""
        return self.liveness == "hung" or (self.job is not None and self.job.state == "hung")

    @property
    def waiting(self) -> str:
        """Why the engine does nothing at the moment."""
        status = self.at_work.status
        return status.waiting if status is not None and self.live else ""

    @property
    def doing(self) -> str:
        """What the engine does where it counts nothing: ``loading torch``."""
        status = self.at_work.status
        return status.doing if status is not None and self.live else ""

    @property
    def starting_s(self) -> float | None:
        """Seconds since an engine was started that has not begun its first phase; none otherwise."""
        since = self.launched if self.launched is not None else self.at_work.attempt_t
        if not self.live or self.replay is not None or self.at_work.phase is not None or since is None:
            return None
        return max(0.0, self.now - since)

    @property
    def asked(self) -> str:
        """``stop`` or ``abort`` from the request until the engine has ended, else nothing."""
        if not self.live:
            return ""
        asked: list[str] = [request.request for request in self.requests]
        if self.launched is not None:
            return "abort" if "abort" in asked else "stop" if asked else ""
        work = self.at_work
        asked += [ack.request for ack in work.acknowledged if ack.attempt == work.attempt]
        return "abort" if "abort" in asked else "stop" if asked else ""

    @property
    def accepted(self) -> bool:
        """Whether the engine has seen what it was asked."""
        work = self.at_work
        return any(ack.attempt == work.attempt for ack in work.acknowledged)


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """Where a replay is."""

    position: float
    """Part of it that has been shown, 0 to 1."""
    speed: float
    paused: bool


class Feed(Protocol):
    """Something that shows a run."""

    run: RunDirectory

    def poll(self) -> RunView:
        """The run now."""


class LiveFeed:
    """A run on disk."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._sight = sight_of(run)
        self._config: dict[str, Any] | None = None
        self._problem = ""
        self._looked_at_config = False
        self._begin()

    def _begin(self) -> None:
        self._beginnings = self._sight.beginnings
        self._follower = EventFollower(self.run.events_path)
        self._state = RunState(id=self.run.id)
        self._journal = Journal(self.run)

    def poll(self) -> RunView:
        """What is on disk now; reads only what is new."""
        now = self._sight.now()
        try:
            return self._look(now)
        except Exception as error:  # a thread calls this: what ended it would end the looking, in silence
            return self._view(now, "gone", problem=f"cannot be read: {error_words(error)}")

    def _look(self, now: float) -> RunView:
        if not self._sight.there() or not self.run.config_toml.exists():
            return self._view(now, "gone", problem="the run's directory is gone")
        if self._sight.beginnings != self._beginnings:
            self._begin()
        problem = self._read_config()
        new = self._follower.poll()
        found = self._sight.look()
        self._state = self._state.apply_all(new)
        self._journal.take(new)
        status = self._sight.status()
        self._state = msgspec.structs.replace(self._state, id=self.run.id).with_status(status)
        return self._view(now, found.state, work=found.work, problem=problem or self._newer())

    def _view(self, now: float, liveness: Liveness, *, work: Work | None = None, problem: str) -> RunView:
        state, launched = self._state, None
        if work is not None and work.attempt > state.newest_attempt:
            # Nothing was heard of it yet: where the attempt before was and what it was asked is over.
            began = read_launched(self.run)
            launched = (began.t if began is not None else now) if work.state != "waiting" else None
            if is_job(work.task):
                state = msgspec.structs.replace(state, job=RunState(task=work.task, attempt=work.attempt))
            else:
                nowhere = ("phase", "block", "blocks", "step", "steps", "status", "error", "job")
                state = msgspec.structs.replace(state, **dict.fromkeys(nowhere))
                liveness = work.state if work.state == "waiting" else "starting"
        job = work if work is not None and is_job(work.task) else None
        cut_off = liveness == "crashed" or (state.job is not None and state.job.outcome is None)
        why = self._sight.why_gone(self._newest()) if cut_off and work is None else ""
        requests: tuple[control.Request, ...] = ()
        tail: tuple[str, ...] = ()
        pid: int | None = None
        if work is not None:
            requests, pid = self._sight.requests(), self._sight.pid()
        if liveness in ("crashed", "hung") or (liveness == "failed" and self._state.exit_code == 1):
            tail = tuple(log_tail(self.run, self._state.attempt))
        return RunView(
            id=self.run.id,
            path=self._sight.place,
            state=state,
            liveness=liveness,
            now=now,
            job=job,
            config=self._config,
            journal=self._told(work, why),
            why_gone=why,
            requests=requests,
            log_tail=tail,
            pid=pid,
            problem=problem,
            place=place_words(self.run, work),
            launched=launched,
            host=self._sight.host,
            trouble=self._sight.trouble(),
        )

    def _told(self, work: Work | None, why: str) -> tuple[Entry, ...]:
        """The journal; ``why`` is how the newest engine has ended, where nobody works on the run.

        Until the next one says something, the one before has the last word: that it was killed is told.
        """
        newest, heard = self._newest(), self._state.newest_attempt
        silent = newest if work is None else work.attempt
        if silent <= heard:
            return self._journal.told(why)
        before = why_gone(self.run, heard, latest=False) if self._journal.cut_off else ""
        told = self._journal.told(before)
        if work is not None or not why:
            return told
        launched = read_launched(self.run)
        began = launched.t if launched is not None else 0.0
        return (*told, Entry(began, one_line(f"{silent_words(heard + 1, newest)}: {why}"), "bad"))

    def _newest(self) -> int:
        """The attempt that was started last."""
        launched = read_launched(self.run)
        return max(self._state.newest_attempt, launched.attempt if launched is not None else 0)

    def _read_config(self) -> str:
        """The configuration never changes; what is wrong with it, if anything."""
        if not self._looked_at_config:
            self._looked_at_config = True
            self._config, self._problem = read_config(self.run)
        return self._problem

    def _newer(self) -> str:
        made_by = self._state.versions.get("eqat", "")
        if made_by and _numbers(made_by) > _numbers(__version__):
            return f"written by eqat {made_by}; this is {__version__}, which may not know all of it"
        return ""


def place_words(run: RunDirectory, work: Work | None) -> str:
    """Where a run is that a cluster or another machine works on, or is to; empty of any other."""
    found = place_of(run, work)
    if work is not None and work.state in ("waiting", "starting") and found["batch"]:
        return batch_words(found["batch"])
    return f"on {cell(found['node'])}" if found["node"] else ""


def read_config(run: RunDirectory) -> tuple[dict[str, Any] | None, str]:
    """The configuration as a tree, or why it cannot be read."""
    try:
        return to_dict(run.config()), ""
    except EqatError as error:
        return None, f"config.toml was not written by this version: {error.message}"
    except Exception as error:
        return None, f"config.toml cannot be read: {error_words(error)}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:8] if re.fullmatch("[0-9]{1,9}", part))


class ReplayFeed:
    """A run as it was, from its event log, at any speed."""

    def __init__(self, run: RunDirectory, speed: float = 10.0) -> None:
        self.run = run
        self.speed = speed
        self.paused = False
        self._reading = threading.Lock()
        self._events: list[AnyEvent] | None = None
        self._clock = 0.0

    def _read(self) -> list[AnyEvent]:
        """All events; read when they are first wanted, which is on a thread: a log can be long."""
        with self._reading:
            if self._events is None:
                self._config, self._problem = read_config(self.run)
                try:
                    found = _the_run_itself(read_events(self.run.events_path)[0])
                except Exception as error:
                    found, self._problem = [], f"the log cannot be read: {error_words(error)}"
                self._times = _shortened([event.t for event in found])
                self._last_poll = time.monotonic()
                self._rewind()
                self._events = found
        return self._events

    @property
    def duration(self) -> float:
        """Seconds of the log, long silences left out."""
        self._read()
        return self._times[-1] if self._times else 0.0

    def _rewind(self) -> None:
        self._done = 0
        self._state = RunState(id=self.run.id)
        self._journal = Journal(self.run)

    def seek(self, by: float) -> None:
        """Go on or back by a part of the whole."""
        self._advance()
        self._clock = min(self.duration, max(0.0, self._clock + by * self.duration))

    def faster(self, factor: float) -> None:
        """Change the speed."""
        self._advance()
        self.speed = min(10_000.0, max(0.1, self.speed * factor))

    def pause(self) -> None:
        """Stop the clock, or start it again; at the end, from the beginning."""
        self._advance()
        if self._clock >= self.duration:
            self._clock = 0.0
        self.paused = not self.paused

    def _advance(self) -> None:
        self._read()
        now = time.monotonic()
        if not self.paused:
            self._clock = min(self.duration, self._clock + (now - self._last_poll) * self.speed)
            self.paused = self._clock >= self.duration  # the end stays, until it is wound back
        self._last_poll = now

    def poll(self) -> RunView:
        """The run at this moment of the replay."""
        log = self._read()
        self._advance()
        if self._done and self._times[self._done - 1] > self._clock:
            self._rewind()
        end = self._done
        while end < len(self._times) and self._times[end] <= self._clock:
            end += 1
        new = log[self._done : end]
        self._done = end
        self._state = self._state.apply_all(new)
        self._journal.take(new)
        left = self.duration - self._clock
        now = self._state.last_t or 0.0
        state = msgspec.structs.replace(self._state, status=Status(eta_s=left, heartbeat=now))
        outcome: Any = state.outcome or ("crashed" if left <= 0 else "running")
        return RunView(
            id=self.run.id,
            path=str(self.run.path),
            state=state,
            liveness=outcome,
            now=now,
            config=self._config,
            journal=self._journal.told(KILLED if outcome == "crashed" else ""),
            problem=self._problem,
            replay=Replay(
                position=self._clock / self.duration if self.duration else 1.0,
                speed=self.speed,
                paused=self.paused,
            ),
        )


def _the_run_itself(log: list[AnyEvent]) -> list[AnyEvent]:
    """The log up to where the run was done; what was done with it afterwards is not its story."""
    for index, event in enumerate(log):
        if isinstance(event, events.RunFinished) and event.outcome == "done":
            return log[: index + 1]
    return log


def _shortened(times: Sequence[float]) -> list[float]:
    """Times from 0 on, ascending, without silences of more than ``LONGEST_PAUSE_S``."""
    shown: list[float] = []
    before = clock = 0.0
    for index, t in enumerate(times):
        clock += min(LONGEST_PAUSE_S, max(0.0, t - before)) if index else 0.0
        shown.append(clock)
        before = max(before, t) if index else t
    return shown
