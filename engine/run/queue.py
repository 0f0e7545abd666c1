"""Runs that are made one after the other on this machine, whoever is logged in.

A folder of this user's holds ``queue.json``: entries in the order in which they have their turn. Whoever
changes it holds ``change`` for that moment, reads the file anew and replaces it whole. One process works on
it, and only while there is work; it holds ``lock``, which tells whether one is alive.

An entry becomes a run in its turn. The id of the run is written before the run is made, and its engine is
started while ``change`` is held: a kill at any instant loses no entry and begins none twice. The runs are
ordinary ones, and know nothing of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from engine.config.derived import absolute_paths
from engine.config.loading import from_toml
from engine.config.run import RunConfig
from engine.config.writing import to_toml
from engine.errors import EqatError, PreflightError, UsageError
from engine.run.directory import RunDirectory
from engine.run.finding import typed_path
from engine.run.launch import next_attempt
from engine.run.liveness import WORKING
from engine.run.lock import RunLock, holder
from engine.run.members import GONE, UNREADABLE, WAITING, Failure, RunId, is_at_work, state_of
from engine.run.proof import is_run
from engine.run.sweep import LARGEST, SCHEMA, refuse_later
from engine.system.files import atomic_write_json, disk_error, full_disk
from engine.system.guarded import BadFile, NoFile, read_struct
from engine.system.ownership import require_own_folders
from engine.system.user_state import STATE_VARIABLE, queue_folder

FILE = "queue.json"
LOG = "queue.log"
"""What whoever works on it has told."""
MOST_WAITING = 1000
"""More are a mistake of a script's."""
MOST_OVER = 100
"""So many entries whose turn is over are remembered."""
PATIENCE_S = 20.0
"""A change waits so long for another one."""
FIRST, LAST, UP, DOWN = "first", "last", "up", "down"

_changing = threading.Lock()
"""A lock of the file system tells processes apart, and no threads."""


Place = Literal["waiting", "now", "over"]
"""Where an entry is in the row."""


class Over(msgspec.Struct, frozen=True, kw_only=True):
    """How the turn of an entry has ended."""

    outcome: str
    """The state that its run was left in, or ``failed`` where there could be none."""
    t: float


class Entry(msgspec.Struct, kw_only=True):
    """One run to be made."""

    number: int
    """What it is called by, for good."""
    config: str
    """The whole configuration, as TOML."""
    runs_dir: str
    """The run is made in this folder."""
    added: float
    """Seconds since 1970."""
    name: str = ""
    model: str = ""
    bits: int = 0
    group_size: int = 0
    """Labels, so that nobody has to read the configuration."""
    run: RunId | None = None
    """The id of the run, written before the run is made."""
    starting: float = 0.0
    """Its engine is being started since then; one that a kill has left to itself may not have told yet."""
    again: int = 0
    """The run goes on although this attempt at it has ended."""
    over: Over | None = None
    error: Failure | None = None

    def configuration(self) -> RunConfig:
        """What the run is made with."""
        return from_toml(self.config, earlier=True)

    @property
    def directory(self) -> RunDirectory | None:
        """The run; none where it is not made, or not there any more."""
        path = Path(self.runs_dir) / self.run if self.run is not None else None
        return RunDirectory(path.resolve()) if path is not None and is_run(path) else None

    @property
    def place(self) -> Place:
        """Whether its turn is still to come, so that it has a place in the row, is now or is over.

        Also where nobody has noted that yet: whoever worked on the queue was killed, and its run has ended.
        """
        if self.over is not None:
            return "over"
        run = self.directory
        if is_at_work(run):
            return "now"
        state = state_of(run) if run is not None else None
        return "over" if turn_of(state, attempt_of(run), self.again, seen=False) == "over" else "waiting"


class _File(msgspec.Struct, kw_only=True):
    schema: int = SCHEMA
    next: int = 1
    paused: bool = False
    entries: list[Entry] = []


Turn = Literal["start", "follow", "over"]
"""What is to be done with an entry."""


def turn_of(state: str | None, attempt: int, again: int, *, seen: bool) -> Turn:
    """What is to be done with an entry whose run is in ``state`` (none where there is no run) after
    ``attempt``. ``seen``: the end was seen by whoever works on the queue.

    A run that somebody stopped stays stopped, unless it was stopped so that it goes on (``again``). One that
    crashed while nobody looked was cut off by what cut the queue off, and goes on.
    """
    if state in WORKING:
        return "follow"
    if state is None:
        return "over" if seen else "start"
    if state in ("done", UNREADABLE):
        return "over"
    if attempt and again == attempt:
        return "start"
    return "start" if state in ("created", "crashed") and not seen else "over"


class Queue:
    """The queue in a folder; what is known of it is what was read last."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = queue_folder() if path is None else path
        self.lock_path = self.path / "lock"
        self.log_path = self.path / LOG
        self._file = _File()
        self.read()

    @property
    def entries(self) -> list[Entry]:
        """In the order in which they have their turn."""
        return self._file.entries

    @property
    def paused(self) -> bool:
        """No other run is begun."""
        return self._file.paused

    @paused.setter
    def paused(self, yes: bool) -> None:
        self._file.paused = yes

    @property
    def worker(self) -> int | None:
        """The process that works on it; none where nobody does."""
        return holder(self.lock_path)

    def read(self) -> None:
        """Take in what is written down now."""
        try:
            found = read_struct(self.path / FILE, _File, LARGEST)
        except NoFile:
            found = _File()
        except BadFile as error:
            if isinstance(error.__cause__, OSError):  # what is in it may be good
                raise
            hint = "once it is moved away, eqat queue add begins another queue; runs are not touched by that"
            raise BadFile(error.message, where=error.where, hint=hint) from error
        refuse_later(found.schema, self.path / FILE)
        self._file = found

    def write(self) -> None:
        """Write down what is known, whole; for whoever is :meth:`changing` it."""
        atomic_write_json(self.path / FILE, self._file)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change the queue, alone, as it is now; what was changed is written in the end.

        Raises:
            PreflightError: where the folder cannot be used, or another change does not end.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            if full_disk(error) is not None:
                raise disk_error(error, self.path) from error
            raise PreflightError(
                f"cannot be made: {error.strerror}",
                where=str(self.path),
                hint=f"${STATE_VARIABLE} names another place for the queue",
            ) from error
        require_own_folders(self.path, ())
        with _changing, _patient(RunLock(self.path / "change")):
            self.read()
            before = msgspec.json.encode(self._file)
            yield
            if msgspec.json.encode(self._file) != before:
                self.write()

    # -- whose turn it is --------------------------------------------------------------------------

    def settle(self, *, seen: int = 0) -> None:
        """Note which turns are over; ``seen`` is the entry whose run was followed to its end."""
        for entry in self.entries:
            if entry.over is not None or (entry.run is None and entry.number != seen):
                continue
            run = entry.directory
            state = state_of(run) if run is not None else None
            if turn_of(state, attempt_of(run), entry.again, seen=entry.number == seen) == "over":
                entry.over = Over(outcome=state or GONE, t=time.time())
        over = [entry for entry in self.entries if entry.over is not None]
        for entry in over[: max(0, len(over) - MOST_OVER)]:
            self.entries.remove(entry)

    def upcoming(self) -> Entry | None:
        """The entry whose run is at work, else the first that waits."""
        left = [entry for entry in self.entries if entry.over is None]
        return next((entry for entry in left if is_at_work(entry.directory)), left[0] if left else None)

    @property
    def has_work(self) -> bool:
        """Whether an entry waits or is at work."""
        return any(entry.place != "over" for entry in self.entries)

    # -- changes, each for whoever is changing it --------------------------------------------------

    def add(self, config: RunConfig, runs_dir: Path) -> Entry:
        """A new entry at the end."""
        if sum(entry.over is None for entry in self.entries) >= MOST_WAITING:
            raise UsageError(f"has {MOST_WAITING} entries already", where="queue")
        entry = Entry(
            number=self._file.next,
            config=to_toml(absolute_paths(config)),  # it is made from another folder than it was typed in
            runs_dir=str(runs_dir.resolve()),
            added=time.time(),
            name=config.name,
            model=config.model.source,
            bits=config.grid.bits,
            group_size=config.grid.group_size,
        )
        self._file.next += 1
        self.entries.append(entry)
        return entry

    def entry(self, number: int) -> Entry:
        """The entry of that number; :class:`UsageError` where there is none."""
        found = next((entry for entry in self.entries if entry.number == number), None)
        if found is None:
            raise UsageError(
                f"there is no entry {number}", where="queue", hint="eqat queue list shows their numbers"
            )
        return found

    def remove(self, numbers: Sequence[int]) -> None:
        """Take entries out; runs that they have made stay. One that is at work is not taken out."""
        found = [self.entry(number) for number in numbers]
        for entry in found:
            _refuse_at_work(entry)
        for entry in found:
            if entry in self.entries:
                self.entries.remove(entry)

    def move(self, number: int, place: str) -> bool:
        """Give an entry that waits another place among those that do: ``first``, ``last``, ``up``, ``down``,
        or before the one of a number. False where it has that place already.

        Raises:
            PreflightError: for one that is at work.
            UsageError: for one that is over, and where there is no such place.
        """
        entry = self.entry(number)
        _refuse_at_work(entry)
        if entry.place != "waiting":
            raise UsageError("is over", where=f"entry {number}", hint="only what waits is moved")
        row = [one for one in self.entries if one.place == "waiting"]
        here = row.index(entry)
        row.remove(entry)
        there = here if place == str(number) else self._place(place, here, row)
        row.insert(there, entry)
        others = [one for one in self.entries if one not in row]
        self._file.entries = [*others, *row]
        return there != here

    def _place(self, place: str, here: int, row: list[Entry]) -> int:
        places = {FIRST: 0, LAST: len(row), UP: max(0, here - 1), DOWN: min(len(row), here + 1)}
        if place in places:
            return places[place]
        number = int(place) if place.isascii() and place.isdigit() else None
        if number is None:
            raise UsageError(
                f"cannot be {place!r}", where="PLACE", hint=f"{', '.join(places)}, or the number of an entry"
            )
        before = self.entry(number)
        if before not in row:
            hint = "only a place among those that wait is given"
            raise UsageError("does not wait", where=f"entry {number}", hint=hint)
        return row.index(before)

    def hold(self) -> RunDirectory | None:
        """Have the run that is at work go on in its next turn, whoever stops it now; the run, if one is."""
        entry = self.upcoming()
        run = entry.directory if entry is not None else None
        if entry is None or run is None or not is_at_work(run):
            return None
        entry.again = attempt_of(run)
        return run

    def put_back(self, numbers: Sequence[int]) -> None:
        """Give entries whose turn is over another one, in which their runs go on."""
        for number in numbers:
            entry = self.entry(number)
            run = entry.directory
            if entry.over is None or is_at_work(run):
                continue
            if run is not None and state_of(run) == "done":
                raise UsageError("is done", where=f"entry {number}", hint="its run has nothing left to do")
            entry.over, entry.error, entry.again = None, None, attempt_of(run)
            self.entries.remove(entry)
            self.entries.append(entry)


def _refuse_at_work(entry: Entry) -> None:
    """Raise :class:`PreflightError` for an entry whose run is at work."""
    if entry.over is None and is_at_work(entry.directory):
        hint = f"eqat stop {named(entry)} stops its run"
        raise PreflightError("is at work", where=f"entry {entry.number}", hint=hint)


@contextmanager
def _patient(lock: RunLock) -> Iterator[None]:
    """Hold a lock that others hold for moments only."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        if (pid := holder(lock.path)) is None:
            try:
                lock.acquire()
                break
            except PreflightError:  # somebody was faster, or it cannot be locked at all
                if time.monotonic() > deadline:
                    raise
        elif time.monotonic() > deadline:
            raise PreflightError("is being changed by another process", where="queue", hint=f"process {pid}")
        time.sleep(0.02)
    try:
        yield
    finally:
        lock.release()


def named(entry: Entry) -> str:
    """What to type here for the run of an entry, which may lie in any folder of runs."""
    return typed_path(Path(entry.runs_dir) / entry.run) if entry.run is not None else "RUN"


# -- what is known of a run ----------------------------------------------------------------------------


def attempt_of(run: RunDirectory | None) -> int:
    """The newest attempt at a run; 0 where there was none."""
    try:
        return next_attempt(run) - 1 if run is not None else 0
    except EqatError:
        return 0


def entry_state(entry: Entry) -> str:
    """Where an entry is, in a word: ``waiting``, or the state of its run, or how its turn has ended.

    A run that was cut off is called so, although it goes on in its next turn.
    """
    run = entry.directory
    if run is None:
        if entry.over is None:
            return WAITING
        return GONE if entry.run is not None and entry.error is None else entry.over.outcome
    state = state_of(run)
    again = entry.over is None and entry.again and entry.again == attempt_of(run)
    return WAITING if again or (entry.over is None and state == "created") else state
