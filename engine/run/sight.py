"""What only the machine that a run is on can tell of it: who works on it, and whether; and what can be asked
there.

A lock, a process and a full disk are things of one machine. Whoever shows a run asks its :class:`Sight` for
them, and reads everything else from the run's files, so that a run of another machine, of which there are
only copies of some files here, is shown by the same code.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

from engine.run import control
from engine.run.deaths import why_gone
from engine.run.directory import RunDirectory
from engine.run.liveness import Look, look
from engine.run.lock import holder
from engine.run.status import Status, read_status
from engine.run.stopping import ask_to_end


class Sight(Protocol):
    """A run, seen from where it is."""

    place: str
    """Its folder, as people name it: of another machine with that machine's name before a colon."""
    host: str
    """What that machine is called; empty for this one."""

    @property
    def beginnings(self) -> int:
        """How often its log turned out to be another one, which whoever follows it reads from its
        beginning."""

    def there(self) -> bool:
        """Whether there is a run at all; it may have been deleted."""

    def look(self) -> Look:
        """Which state it is in, and who works on it."""

    def status(self) -> Status | None:
        """What its engine said last of itself."""

    def pid(self) -> int | None:
        """The process that holds its lock."""

    def requests(self) -> tuple[control.Request, ...]:
        """What was asked of the engine and not acknowledged yet."""

    def why_gone(self, attempt: int, code: int | None = None) -> str:
        """Why the engine of the newest ``attempt`` has ended; ``code`` is how, where that is known."""

    def now(self) -> float:
        """The time there: what is measured against its clocks."""

    def trouble(self) -> str:
        """Why nothing can be seen at the moment, in one sentence; empty where it can."""

    def require(self) -> None:
        """EqatError where nothing will be seen any more."""

    def ask(self, action: control.Action) -> str:
        """Leave a request for its engine; the number of a job that only waited, and was taken out of Slurm
        instead, else empty."""


class FromAfar(Sight, Protocol):
    """The same of another machine's run, where not even an engine can be started from here but by asking."""

    def types(self, command: str) -> str:
        """What to type here for a command of eqat on the run."""

    def resume(self) -> None:
        """Start its engine again."""

    def kill(self) -> None:
        """Kill its engine."""


class OnDisk:
    """A run on this machine's file systems."""

    beginnings = 0
    host = ""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self.place = str(run.path)

    def there(self) -> bool:
        return os.path.isdir(self._run.path)

    def look(self) -> Look:
        return look(self._run)

    def status(self) -> Status | None:
        return read_status(self._run)

    def pid(self) -> int | None:
        return holder(self._run.lock_path)

    def requests(self) -> tuple[control.Request, ...]:
        return tuple(control.pending(self._run))

    def why_gone(self, attempt: int, code: int | None = None) -> str:
        return why_gone(self._run, attempt, code=code)

    def now(self) -> float:
        return time.time()

    def trouble(self) -> str:
        return ""

    def require(self) -> None:
        pass

    def ask(self, action: control.Action) -> str:
        return ask_to_end(self._run, action)


class SeenFromAfar(RunDirectory):
    """Copies of some files of a run that is elsewhere; nothing is ever computed in it."""

    sight: FromAfar


def sight_of(run: RunDirectory) -> Sight:
    """Whom to ask about ``run``."""
    return run.sight if isinstance(run, SeenFromAfar) else OnDisk(run)
