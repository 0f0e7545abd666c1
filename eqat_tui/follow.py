"""Following a run to its end, and what Ctrl-C means meanwhile.

The engine is a process of its own that outlives the terminal; whoever follows it only reads files. So the
follower may be killed at any time. A run is over when the engine's process is gone, not when its log says
so: only then is everything it wrote on the disk.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import PurePath
from types import FrameType
from typing import Literal, NamedTuple

from engine.errors import ExitCode, run_is_gone
from engine.run.directory import RunDirectory
from engine.run.event_log import EventFollower
from engine.run.events import AnyEvent, RunFinished
from engine.run.launch import exit_code, log_path, next_attempt, refuse_second
from engine.run.liveness import Work
from engine.run.shown import place_of
from engine.run.sight import sight_of
from engine.run.state import RunState
from engine.system.guarded import BadFile, bad_file
from engine.system.log_bytes import tail
from eqat_tui.display import Display
from eqat_tui.hearing import hearing
from eqat_tui.run_text import batch_words, silence

POLL_S = 0.2
TAIL_BYTES = 1 << 16
OnInterrupt = Literal["stop", "leave"]


class Gone(NamedTuple):
    """Whether the engine's process is gone, and its exit code where that can be known."""

    gone: bool
    code: int | None


class Left(Exception):
    """The follower was asked to leave; the run goes on."""


class Follower:
    """Reads a run's events as they come and shows them, until its engine is gone."""

    def __init__(self, run: RunDirectory, display: Display) -> None:
        self.run = run
        self.display = display
        self._sight = sight_of(run)
        self._begin()
        self._finished: RunFinished | None = None
        self._interrupts = 0
        self._handled = 0
        self._warned = False
        self._stopping = False
        self._terminated = False
        self._suspended = self._continued = False
        self._on_interrupt: OnInterrupt = "stop"
        self._waiting = ""
        self._said_hung = False
        self._trouble = ""
        self._in_batch = False
        self._looked = float("-inf")

    def _begin(self) -> None:
        self.state = RunState(id=self.run.id)
        self._beginnings = self._sight.beginnings
        self._events = EventFollower(self.run.events_path)

    @property
    def asked_to_end(self) -> bool:
        """Whether a signal has asked for the run to be stopped, or for looking at it to end."""
        return bool(self._interrupts or self._warned or self._terminated)

    @property
    def was_warned(self) -> bool:
        """Whether a batch system has said that it is about to end the run."""
        return self._warned

    def catch_up(self) -> None:
        """Take in what happened already without telling it again."""
        for event in self._poll():
            self.state = self.state.apply(event)

    def follow(self, *, start: Callable[[], int] | None = None, on_interrupt: OnInterrupt = "stop") -> int:
        """Show progress until the run is over; returns the engine's exit code.

        ``start`` starts the engine and returns its pid; then the operating system says how it ended.
        It is called in here so that a Ctrl-C at any moment of it is a request to the engine. Without it,
        the run's lock tells that the run is over, and its last event how.
        """
        self._on_interrupt = on_interrupt
        with hearing(self._handlers()):
            try:
                pid = start() if start is not None else None
                if pid is None and self._sight.look().work is not None:
                    self._take()
                    self.display.join(self.state)
                code = self._until_gone(pid)
                self._take()
            finally:
                self.display.close()
        return self.verdict(code)

    def _until_gone(self, pid: int | None) -> int | None:
        """Wait for the end; the process's exit code where it can be known."""
        while not (gone := self.look(pid)).gone:
            time.sleep(POLL_S)
        return gone.code

    def look(self, pid: int | None) -> Gone:
        """Show what is new, pass on what was asked for, and say whether the engine is gone.

        Raises:
            Left: where whoever follows is to leave.
        """
        self._answer_shell()  # before anything is drawn over what it wrote
        self._take()
        self._answer_interrupts()
        code = exit_code(pid) if pid is not None else None
        if code is not None:
            return Gone(True, code)
        now = time.monotonic()
        if now - self._looked >= 1.0:
            self._looked = now
            self._sight.require()
            work = self._sight.look().work
            if pid is None and (work is None or not self._sight.there()):
                return Gone(True, None)
            self._tell_trouble()
            self._tell_hung(work is not None and work.state == "hung")
            self._tell_batch(work)
        return Gone(False, None)

    def _poll(self) -> list[AnyEvent]:
        if self._sight.beginnings != self._beginnings:
            self._begin()
        try:
            return self._events.poll()
        except OSError as error:
            raise bad_file(error, self.run.events_path) from error

    def _take(self) -> None:
        new = self._poll()
        for event in new:
            self.state = self.state.apply(event)
            if isinstance(event, RunFinished):
                self._finished = event
        self.state = self.state.with_status(self._sight.status())
        self._tell_waiting()
        self.display.update(self.state, new)

    def verdict(self, code: int | None) -> int:
        """The exit code of the run; a process that went without a last word is given a tail of its log."""
        if self._finished is None and code is None and self.state.exit_code is not None:
            return self.state.exit_code  # over before we came
        if self._finished is not None and code in (None, 0, self._finished.exit_code):
            return self._finished.exit_code
        if not self._sight.there():
            raise run_is_gone(PurePath(self._sight.place))
        if code == ExitCode.PREFLIGHT:
            refuse_second(self.run)  # two were started at once, and the other has the run
        ended = self._sight.status()
        if ended is not None and ended.outcome is not None and ended.attempt >= self.state.newest_attempt:
            if ended.failure:
                self.display.note(f"error: {ended.failure}")
            if code in (None, ended.exit_code):  # the log had no room for the last words; the status had
                return ended.exit_code or 0
        # No last word, or one that the process then contradicted by how it ended.
        print_tail(self.run, code, self.display)
        if code is None:
            # Not our child, so how it ended is not known; nearly always it was killed.
            return 128 + signal.SIGKILL
        return _shell_code(code) if code else int(ExitCode.BUG)

    def _tell_hung(self, hung: bool) -> None:
        if hung and not self._said_hung:
            pid, silent = self._sight.pid(), silence(self._sight.status(), self._sight.now())
            self.display.note(f"no sign of life from the engine (process {pid}) for {silent}; still waiting")
        self._said_hung = hung

    def _tell_trouble(self) -> None:
        """Once when the machine of the run cannot be seen any more, and once when it can again."""
        trouble = self._sight.trouble()
        if bool(trouble) != bool(self._trouble):
            self.display.note(trouble or "connected again")
        self._trouble = trouble

    def _tell_batch(self, work: Work | None) -> None:
        waits = work is not None and work.state == "waiting"
        found = place_of(self.run, work)["batch"] if waits else None
        if found is not None and not self._in_batch:
            self.display.note(f"waiting {batch_words(found)}")
        self._in_batch = waits

    def _tell_waiting(self) -> None:
        status = self.state.at_work.status
        waiting = status.waiting if status is not None else ""
        if bool(waiting) != bool(self._waiting):
            self.display.note(f"paused: {waiting}" if waiting else "no longer paused")
        self._waiting = waiting

    # -- Ctrl-C ------------------------------------------------------------------------------------

    def _handlers(self) -> dict[int, Callable[[int, FrameType | None], None]]:
        return {
            signal.SIGINT: self.interrupted,
            signal.SIGTERM: self.terminated,
            signal.SIGTSTP: self.suspended,
            signal.SIGCONT: self.continued,
            signal.SIGUSR1: self.warned,
        }

    def interrupted(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: only counts. What follows from it happens between two polls."""
        self._interrupts += 1

    def terminated(self, number: int, frame: FrameType | None) -> None:
        """Signal handler. For whoever started the run it is an interrupt: in a container or a batch job this
        process is the one that is told, and the engine goes when it does. Others only stop looking."""
        if self._on_interrupt == "leave":
            self._terminated = True
        else:
            self._interrupts += 1

    def warned(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: a batch system's warning. It stops the run and never aborts it, not even together
        with the SIGTERM that follows it."""
        if self._on_interrupt == "leave":
            self._terminated = True
        else:
            self._warned = True

    def _answer_interrupts(self) -> None:
        if self._terminated:
            raise Left
        if self._warned:
            self._stop()
        while self._handled < self._interrupts:
            self._handled += 1
            if self._on_interrupt == "leave" or self._handled > 2:
                raise Left
            if self._handled == 1:
                self._stop()
            else:
                self._sight.ask("abort")
                self.display.note("aborting; Ctrl-C again leaves the engine to itself")

    def _stop(self) -> None:
        """Ask for a stop, once."""
        if not self._stopping:
            self._stopping = True
            job = self._sight.ask("stop")
            self.display.note(
                f"took job {job} out of Slurm"
                if job
                else "stopping at the next step, resumable; Ctrl-C again to abort"
            )

    # -- Ctrl-Z ------------------------------------------------------------------------------------

    def suspended(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the shell wants the terminal, and gets it between two polls."""
        self._suspended = True

    def continued(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the shell goes on with this process, in the foreground or behind it."""
        self._continued = True

    def _answer_shell(self) -> None:
        """Stop, with the terminal as it was found; afterwards begin to draw anew. The engine goes on."""
        if self._suspended:
            self._suspended = False
            self.display.leave()
            handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTSTP)  # returns when somebody says `fg` or `bg`
            signal.signal(signal.SIGTSTP, handler)
            self._continued = True
        if self._continued:
            self._continued = False
            self.display.come_back()


def _shell_code(code: int) -> int:
    """A process that was ended by signal N has exit code 128 + N in every shell."""
    return 128 - code if code < 0 else code


def print_tail(run: RunDirectory, code: int | None, display: Display, lines: int = 20) -> None:
    """Say that the engine died without a last word, and show its last lines."""
    attempt = max(1, next_attempt(run) - 1)
    log, sight = log_path(run, attempt), sight_of(run)
    how = {None: "", 0: " with exit code 0"}.get(code, f" with exit code {code}" if (code or 0) > 0 else "")
    if code is not None and code < 0:
        how = f" by signal {_signal_name(-code)}"
    display.note(
        f"error: the engine ended{how} without saying why; the end of {sight.place}/logs/{log.name}:"
    )
    try:
        last = tail(log, TAIL_BYTES)[0].decode(errors="replace").splitlines()[-lines:]
    except (OSError, BadFile) as error:
        last = [f"({error})"]
    for line in last or ["(empty)"]:
        display.note(f"  {line}")
    display.note(f"why: {sight.why_gone(attempt, code)}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
