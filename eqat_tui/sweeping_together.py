"""Several runs of a sweep at a time, each with a GPU or some cores of its own.

What they say is told in lines that begin with their number. A request to stop is passed on to all of them.
"""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import NamedTuple

from engine.config.sweeps import settings_words
from engine.errors import EqatError, ExitCode
from engine.run.directory import RunDirectory
from engine.run.finding import shorten
from engine.run.launch import launch, log_path
from engine.run.members import is_at_work, state_of
from engine.run.shares import Share
from engine.run.sweep import Sweep
from eqat_tui.display import PlainDisplay
from eqat_tui.follow import POLL_S, Follower, Left
from eqat_tui.hearing import hearing
from eqat_tui.output import cell, error_words, one_line, say
from eqat_tui.sweep_members import ENDS, STOPS, made, note

PROGRESS_S = 60.0
"""Each run at work says where it is at most this often."""


class _Run(NamedTuple):
    """One that is followed."""

    number: int
    follower: Follower
    pid: int | None
    """None of an engine that an earlier process has started."""
    share: Share


class Together:
    """One process that carries a sweep out, ``len(shares)`` runs at a time."""

    def __init__(self, sweep: Sweep, shares: list[Share]) -> None:
        self.sweep = sweep
        self._free = list(shares)
        self._runs: list[_Run] = []
        self._codes: dict[int, int] = {}
        self._left = False
        self._asked = False
        self._waiting: list[int] = []

    def make_all(self) -> int:
        """Every run that is not done; a request to stop, or a run that was stopped, ends the row."""
        with hearing(dict.fromkeys(STOPS, self._hear)):
            self._begin()
            while self._runs or (self._waiting and not self._asked):
                while self._waiting and self._free and not self._asked:
                    self._start(self._waiting.pop(0))
                for run in list(self._runs):
                    self._look(run)
                if self._left:
                    return ExitCode.ABORTED
                time.sleep(POLL_S)
        codes = [self._codes[number] for number in sorted(self._codes) if self._codes[number]]
        ended = [code for code in codes if code in ENDS]
        waiting = [int(ExitCode.STOPPED)] if self._waiting else []
        return next(iter([*ended, *waiting, *codes]), int(ExitCode.DONE))

    def _begin(self) -> None:
        """What an earlier process has left at work is followed, in the place of as many others."""
        for number, member in enumerate(self.sweep.members):
            run = self.sweep.run_of(member)
            if run is not None and is_at_work(run):
                self._follow(number, run, self._share(member.share))
            elif run is None or state_of(run) != "done":
                self._waiting.append(number)

    def _share(self, name: str) -> Share:
        """The place that a run at work has, as it was written down, else any; none where more are at work
        than are asked for."""
        known = next((share for share in self._free if share.name == name), None)
        found = known or next(iter(self._free), Share())
        if found in self._free:
            self._free.remove(found)
        return found

    def _title(self, number: int) -> str:
        return f"[{number + 1}/{len(self.sweep.members)}]"

    def _start(self, number: int) -> None:
        member, share = self.sweep.members[number], self._free.pop(0)
        title = f"{self._title(number)} {cell(settings_words(member.settings))}"
        try:
            run = self.sweep.run_of(member) or made(self.sweep, member)
            member.share = share.name
            self.sweep.write()
            note(self.sweep, member, None)
            say(f"{title}: run {run.id} on {share.name}")
            self._follow(number, run, share)
        except EqatError as error:
            self._free.append(share)
            self._fail(number, error)

    def _follow(self, number: int, run: RunDirectory, share: Share) -> None:
        follower = Follower(run, PlainDisplay(PROGRESS_S, prefix=f"{self._title(number)} "))
        follower.catch_up()
        pid = None if is_at_work(run) else launch(run, share=share)
        if pid is None:
            follower.display.join(follower.state)
        self._runs.append(_Run(number, follower, pid, share))
        if self._asked:  # while it was started
            follower.warned(signal.SIGUSR1, None)

    def _look(self, run: _Run) -> None:
        """At one that is at work; what is over makes room."""
        try:
            gone, code = run.follower.look(run.pid)
            if not gone:
                return
            verdict = run.follower.verdict(code)
        except Left:
            self._left = True
            say("left; the engines go on")
            return
        except EqatError as error:
            verdict = self._fail(run.number, error)
        if verdict == ExitCode.BUG:
            attempt = run.follower.state.newest_attempt
            say(f"{self._title(run.number)} log: {shorten(log_path(run.follower.run, attempt))}")
        self._asked = self._asked or verdict in ENDS
        self._codes[run.number] = verdict
        self._runs.remove(run)
        if run.share.name:
            self._free.append(run.share)
        say(f"{self._title(run.number)} {state_of(run.follower.run)}")

    def _fail(self, number: int, error: EqatError) -> int:
        say(f"{self._title(number)} error: {one_line(error_words(error))}")
        note(self.sweep, self.sweep.members[number], error)
        self._codes[number] = int(error.exit_code)
        return int(error.exit_code)

    # -- what all of them are asked for --------------------------------------------------------------

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: as whoever follows one run hears it; no other is begun."""
        self._asked = True
        for run in list(self._runs):
            heard = run.follower.warned if number == signal.SIGUSR1 else run.follower.interrupted
            heard(number, frame)
