"""The table of trackers: one row for each program or format that a run's log can be handed to."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from engine.config.tables import Table, load_named
from engine.errors import PreflightError, first_line

if TYPE_CHECKING:  # the help names the trackers, and needs nothing of what they do
    from engine.run.directory import RunDirectory
    from eqat_tui.tracking.points import Point


class Sink(Protocol):
    """Where points go. Whatever it raises ends the command and nothing else."""

    def write(self, points: Sequence[Point]) -> None:
        """Hand on what came; the reader of the other side may look at it then."""

    def close(self) -> None:
        """There is no more."""


class Tracker(msgspec.Struct, frozen=True, kw_only=True):
    """A program or a format."""

    name: str
    sink: str
    """``module:function`` that opens one for a run: called with the run and where it writes, or ``None``."""
    library: str = ""
    """A module that not every installation has."""
    install: str = ""
    """What brings it."""

    def open(self, run: RunDirectory, to: Path | None) -> Sink:
        """A sink for ``run``.

        Raises:
            PreflightError: where its library is not installed.
            EqatError: where nothing can be written to ``to``.
        """
        if self.library and find_spec(self.library) is None:
            raise PreflightError(f"{self.library} is not installed", where=self.name, hint=self.install)
        try:
            sink: Sink = load_named(self.sink)(run, to)
        except ImportError as error:  # another release of something that it needs
            raise PreflightError(
                f"cannot be loaded: {first_line(error)}", where=self.name, hint=self.install
            ) from error
        return sink


TRACKERS = Table(
    "tracker",
    Tracker(name="jsonl", sink="eqat_tui.tracking.jsonl:open_lines"),
    Tracker(
        name="tensorboard",
        sink="eqat_tui.tracking.tensorboard:open_events",
        library="tensorboard",
        install="pip install tensorboard",
    ),
    Tracker(
        name="wandb",
        sink="eqat_tui.tracking.hosted:open_wandb",
        library="wandb",
        install="pip install wandb",
    ),
    Tracker(
        name="trackio",
        sink="eqat_tui.tracking.hosted:open_trackio",
        library="trackio",
        install="pip install trackio",
    ),
)
