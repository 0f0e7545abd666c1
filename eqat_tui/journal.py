"""The journal of a run: the lines of its log that stay, attempts that were cut off included."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from engine.run import events
from engine.run.deaths import KILLED, why_gone
from engine.run.directory import RunDirectory
from engine.run.events import AnyEvent
from engine.run.sight import sight_of
from engine.run.task import is_job, job_name
from eqat_tui.display import lasting_line
from eqat_tui.output import one_line
from eqat_tui.words import within_run

JOURNAL_LINES = 1000


class Entry(NamedTuple):
    """One line of the journal: what happened when."""

    t: float
    text: str
    role: str = ""


class Journal:
    """The lines that stay, as events come in; the logs of ``run`` say why an attempt died."""

    def __init__(self, run: RunDirectory | None = None) -> None:
        self.run = run
        self._place = sight_of(run).place if run is not None else ""
        self.entries: deque[Entry] = deque(maxlen=JOURNAL_LINES)
        self._open: events.RunStarted | events.AttemptStarting | None = None
        self._attempt = 0
        self._last_t = 0.0

    def take(self, new: Iterable[AnyEvent]) -> None:
        """Add what ``new`` has to tell."""
        for event in new:
            if isinstance(event, events.RunStarted | events.AttemptStarting):
                if self._open is not None and self._open.attempt != event.attempt:
                    run, attempt = self.run, self._open.attempt
                    why = KILLED if run is None else why_gone(run, attempt, latest=False)
                    self.entries.append(died(self._open, self._last_t, why))
                silent = silent_words(self._attempt + 1, event.attempt - 1)
                if silent:
                    self.entries.append(Entry(event.t, silent, "bad"))
                self._open, self._attempt = event, event.attempt
            elif isinstance(event, events.RunFinished):
                self._open = None
            self._last_t = event.t
            text, role = _words(event, self._place)
            if text:
                self.entries.append(Entry(event.t, one_line(text), role))

    @property
    def cut_off(self) -> bool:
        """Whether the last attempt that spoke has had no last word."""
        return self._open is not None

    def told(self, why: str = "") -> tuple[Entry, ...]:
        """All entries; that an engine died is one, although it could not write it."""
        if not why or self._open is None:
            return tuple(self.entries)
        return (*self.entries, died(self._open, self._last_t, why))


def died(begun: events.RunStarted | events.AttemptStarting, t: float, why: str) -> Entry:
    """An attempt that ended without a last word."""
    return Entry(t, one_line(f"{_who(begun)} died without a word: {why}"), "bad")


def _who(begun: events.RunStarted | events.AttemptStarting) -> str:
    """``attempt 2``, or what else is done by it."""
    return f"{job_name(begun.task)} {begun.attempt}" if is_job(begun.task) else f"attempt {begun.attempt}"


def silent_words(first: int, last: int) -> str:
    """Of attempts that no event speaks of: their engines ended before they could write one."""
    if last < first:
        return ""
    which = f"attempt {first}" if first == last else f"attempts {first} to {last}"
    return f"{which} ended before the first word"


def _words(event: AnyEvent, place: str) -> tuple[str, str]:
    """What an event has to tell, and its role; ``place`` is the run's folder."""
    match event:
        case events.Metric() | events.Memory():
            return "", ""
        case events.AttemptStarting():
            return f"{_who(event)} starts ({event.host}, process {event.pid})", "strong"
        case events.RunStarted():
            return f"{_who(event)} on {event.device} ({event.host}, process {event.pid})", "strong"
        case events.CheckpointCommitted():
            place = f"block {event.block}" if event.block is not None else event.phase
            step = f", step {event.step}" if event.step is not None else ""
            return f"checkpoint {event.generation}: {place}{step}", "muted"
        case events.RunFinished():
            what = f"{job_name(event.task)} " if is_job(event.task) else ""
            return f"{what}{event.outcome} (exit code {event.exit_code})", "strong"
        case events.Error():
            inside = msgspec.structs.replace(event, where=within_run(event.where, place))
            return lasting_line(inside) or "", "bad"
        case events.Warning() | events.ControlAck():
            return lasting_line(event) or "", "warn"
    return (lasting_line(event) or "").strip(), ""
