"""Runs that belong together, as the app shows them: the queue of this machine, and each sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.sweeps import settings_words
from engine.errors import EqatError
from engine.run.directory import RunDirectory
from engine.run.liveness import WORKING
from engine.run.members import GONE, WAITING, is_at_work
from engine.run.queue import Entry, Place, Queue, entry_state
from engine.run.sweep import Member, Sweep, list_sweeps
from engine.system.user_state import machine_name
from eqat_tui.output import error_words
from eqat_tui.words import model_name

MOST_SWEEPS = 50
"""The newest ones are shown."""
QUEUE = "queue"
"""The name of that group; a sweep's is its folder's."""

Summary = dict[str, Any]
Summaries = Callable[[Sequence[RunDirectory]], list[Summary]]


class Row(NamedTuple):
    """A run of a group, made or still to be made."""

    number: int
    what: str
    """What it is, or by what it differs from the others."""
    state: str
    turn: Place
    run: RunDirectory | None
    summary: Summary | None
    error: str

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state == "done"


class Group(NamedTuple):
    """Runs that are made together."""

    name: str
    title: str
    path: str
    rows: tuple[Row, ...]
    worker: bool
    """Whether a process sees to it that the next one is begun."""
    paused: bool
    problem: str
    """Why it cannot be read."""

    @property
    def is_queue(self) -> bool:
        """Whether it is the queue, and not a sweep."""
        return self.name == QUEUE

    @property
    def over(self) -> int:
        """How many of its runs have had their turn; of a sweep, how many are done."""
        return sum(row.turn == "over" if self.is_queue else row.done for row in self.rows)

    @property
    def share(self) -> float:
        """How much of it is done, runs at work by the phases that they have behind them."""
        if not self.rows:
            return 0.0
        return sum(1.0 if row.turn == "over" else _share(row) for row in self.rows) / len(self.rows)


def _share(row: Row) -> float:
    """How much of a run is done, by time."""
    if row.summary is None:
        return 0.0
    done, left = row.summary["seconds"], row.summary["eta_s"]
    return done / (done + left) if done and left is not None and done + left > 0 else 0.0


def read_groups(runs_dir: Path, summaries: Summaries) -> list[Group]:
    """The queue, and the sweeps in ``runs_dir``, newest first."""
    return [_queue(summaries), *(_sweep(path, summaries) for path in list_sweeps(runs_dir)[:MOST_SWEEPS])]


def _queue(summaries: Summaries) -> Group:
    title = f"queue of {machine_name()}"
    try:
        queue = Queue()
    except EqatError as error:
        return Group(QUEUE, title, "", (), False, False, error_words(error))
    runs = [entry.directory for entry in queue.entries]
    found = _summaries(runs, summaries)
    rows = [
        _queued(entry, run, summary) for entry, run, summary in zip(queue.entries, runs, found, strict=True)
    ]
    return Group(QUEUE, title, str(queue.path), tuple(rows), queue.worker is not None, queue.paused, "")


def _queued(entry: Entry, run: RunDirectory | None, summary: Summary | None) -> Row:
    group = "channel" if entry.group_size == -1 else f"g{entry.group_size}"
    what = f"{model_name(entry.model)} w{entry.bits}{group} {entry.name}"
    error = entry.error.message if entry.error is not None else ""
    return Row(entry.number, what, entry_state(entry), entry.place, run, summary, error or _error(summary))


def _sweep(path: Path, summaries: Summaries) -> Group:
    try:
        sweep = Sweep.open(path)
    except EqatError as error:
        return Group(path.name, path.name, str(path), (), False, False, error_words(error))
    runs = [sweep.run_of(member) for member in sweep.members]
    found = _summaries(runs, summaries)
    rows = [
        _member(number, member, run, summary)
        for number, (member, run, summary) in enumerate(zip(sweep.members, runs, found, strict=True), 1)
    ]
    return Group(sweep.id, sweep.id, str(sweep.path), tuple(rows), sweep.at_work, False, "")


def _member(number: int, member: Member, run: RunDirectory | None, summary: Summary | None) -> Row:
    state = summary["state"] if summary is not None else member.unmade
    ended = state not in (WAITING, GONE, "created", *WORKING)
    turn: Place = "over" if ended else "now" if is_at_work(run) else "waiting"
    error = member.error.message if member.error is not None else ""
    return Row(number, settings_words(member.settings), state, turn, run, summary, error or _error(summary))


def _error(summary: Summary | None) -> str:
    return (summary["error"] or "") if summary is not None else ""


def _summaries(runs: Sequence[RunDirectory | None], summaries: Summaries) -> list[Summary | None]:
    """A summary for each run that there is."""
    there = [run for run in runs if run is not None]
    found = iter(summaries(there))
    return [next(found) if run is not None else None for run in runs]
