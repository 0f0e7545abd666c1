"""The process that works on the queue: one run after the other, until none waits.

The engine of each run is a process of its own. Whoever works on the queue next finds it at work, or where
that has ended, and goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar

from engine.errors import EqatError, ExitCode, PreflightError
from engine.plan.plan import check, make_plan
from engine.run import control
from engine.run.directory import RunDirectory
from engine.run.launch import exit_code, launch
from engine.run.lock import RunLock
from engine.run.members import failure_of, is_at_work
from engine.run.queue import Entry, Over, Queue
from engine.system.files import disk_error
from eqat_tui.hearing import hearing
from eqat_tui.output import cell, error_words, format_time, one_line, say
from eqat_tui.sweep_members import STOPS

POLL_S = 0.2
QUIET_S = 10.0
"""An engine has told of itself this long after it was started."""
FULL_S = 5.0
"""A full disk is tried again so often."""
T = TypeVar("T")


class _Begun(NamedTuple):
    """The run whose turn it is."""

    number: int
    run: RunDirectory
    pid: int | None
    """None of an engine that somebody else has started."""


class Worker:
    """One process that works on the queue."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self._lock = RunLock(queue.lock_path)
        self._asked = False

    def work(self) -> int:
        """Make what waits, in order. A request to end stops the run at work, which then goes on first when
        the queue does."""
        with hearing(dict.fromkeys(STOPS, self._hear)):
            with self.queue.changing():
                if self.queue.worker is not None:
                    return ExitCode.DONE  # somebody was faster
                self._lock.acquire()
            try:
                while (begun := self._next()) is not None:
                    self._follow(begun)
            finally:
                self._lock.release()
        return ExitCode.STOPPED if self._asked else ExitCode.DONE

    # -- the next one ------------------------------------------------------------------------------

    def _next(self) -> _Begun | None:
        """The run that is at work, else the next one, started; none where there is nothing to do."""
        while not self._asked:
            self.queue.read()
            entry = self.queue.upcoming()
            problem = _problem(entry) if entry is not None and not self.queue.paused else None
            number = entry.number if entry is not None else 0
            found = self._patiently(partial(self._begin, number, problem))
            if found is not True:
                return found or None
            if entry is not None and entry.starting:
                time.sleep(POLL_S)
        return None

    def _begin(self, planned: int, problem: EqatError | None) -> _Begun | bool:
        """Begin the turn of the entry that was ``planned``, if it is still its turn. True: look again. False:
        nothing is to be done, and nobody works on the queue any more; who adds an entry now sees that."""
        with self.queue.changing():
            self.queue.settle()
            entry = self.queue.upcoming()
            run = entry.directory if entry is not None else None
            if entry is not None and run is not None and is_at_work(run):
                return _Begun(entry.number, run, None)
            if entry is None or self.queue.paused or self._asked:
                self._lock.release()
                return False
            if entry.number != planned or abs(time.time() - entry.starting) < QUIET_S:
                return True
            try:
                if problem is not None:
                    raise problem
                return self._start(entry, run)
            except (EqatError, OSError) as error:
                if is_at_work(entry.directory):  # an engine that has only just told of itself
                    return True
                _tell(entry.number, f"error: {one_line(error_words(error))}")
                told = error if isinstance(error, EqatError) else disk_error(error, Path(entry.runs_dir))
                entry.error, entry.over = failure_of(told), Over(outcome="failed", t=time.time())
                return True

    def _start(self, entry: Entry, run: RunDirectory | None) -> _Begun:
        """Make the run where it is not made, and start its engine."""

        def announce(run_id: str) -> None:
            entry.run = run_id
            self.queue.write()

        if run is None:
            place = Path(entry.runs_dir)
            run = RunDirectory.create(place, entry.configuration(), announce=announce)
        entry.error, entry.starting = None, time.time()
        self.queue.write()
        try:
            pid = launch(run)
        finally:
            entry.starting = 0.0
        _tell(entry.number, f"run {run.id}")
        return _Begun(entry.number, run, pid)

    # -- the one at work ---------------------------------------------------------------------------

    def _follow(self, begun: _Begun) -> None:
        """Wait for the end of a run, and note how its turn has ended."""
        pid, passed_on = begun.pid, False
        while True:
            if pid is not None and exit_code(pid) is not None:
                pid = None  # where it was refused, another engine has the run
            if pid is None and not is_at_work(begun.run):
                break
            if self._asked and not passed_on:
                passed_on = True
                self._stop(begun)
            time.sleep(POLL_S)
        self._patiently(lambda: self._settle(begun.number))
        entry = next((one for one in self.queue.entries if one.number == begun.number), None)
        _tell(begun.number, entry.over.outcome if entry is not None and entry.over is not None else "goes on")

    def _stop(self, begun: _Begun) -> None:
        """Ask the run to stop, and note that it is to go on."""
        try:
            with self.queue.changing():
                self.queue.hold()
        except EqatError as error:
            _tell(begun.number, f"error: {one_line(error_words(error))}")
        control.request(begun.run, "stop")

    def _settle(self, seen: int) -> None:
        with self.queue.changing():
            self.queue.settle(seen=seen)

    def _patiently(self, do: Callable[[], T]) -> T:
        """``do``, as often as it takes until the disk has room for what it writes."""
        said = False
        while True:
            try:
                return do()
            except EqatError as error:
                if error.exit_code != ExitCode.DISK_FULL or self._asked:
                    raise
                if not said:
                    said = True
                    say(f"waiting: {one_line(error_words(error))}")
                time.sleep(FULL_S)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: only notes it."""
        self._asked = True


def _problem(entry: Entry) -> EqatError | None:
    """Why the run of an entry cannot be made now; none where it is made already."""
    try:
        if entry.directory is None:
            place = Path(entry.runs_dir)
            if not place.is_dir():
                raise PreflightError("is not there any more", where=str(place), hint="is its disk mounted?")
            check(make_plan(entry.configuration(), runs_dir=place))
    except EqatError as error:
        return error
    except Exception as error:  # a bug that one entry meets must not stand in the way of all behind it
        return EqatError(f"cannot be planned: {error_words(error)}", exit_code=ExitCode.BUG)
    return None


def _tell(number: int, words: str) -> None:
    say(f"{format_time(time.time(), '%Y-%m-%d %H:%M:%S')} entry {number}: {cell(words, 1000)}")
