"""Which run is meant where none was named."""

from __future__ import annotations

from pathlib import Path

from engine.errors import EqatError
from engine.run.directory import RunDirectory
from engine.run.elsewhere import is_worked_on
from engine.run.finding import list_runs

RECENT = 200
"""Among so many of the newest runs one that is running is looked for."""


def working(place: Path) -> RunDirectory | None:
    """The newest run that an engine works on."""
    return next((run for run in _newest(place) if is_worked_on(run)), None)


def likely(place: Path) -> RunDirectory | None:
    """The newest run that an engine works on, else the newest of all."""
    runs = _newest(place)
    return next((run for run in runs if is_worked_on(run)), runs[0] if runs else None)


def _newest(place: Path) -> list[RunDirectory]:
    try:
        return list_runs(place)[:RECENT]
    except (EqatError, OSError):
        return []
