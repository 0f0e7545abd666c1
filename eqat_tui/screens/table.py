"""The table of screens: one row a screen, and one file that draws it.

The app's modes, the digits that go to them, the tabs on top, the command palette and the help all follow from
these rows. A row is light: the file is imported when its screen comes to the front for the first time.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine.config.tables import Table, load_named


class ScreenRow(msgspec.Struct, frozen=True, kw_only=True):
    """A screen, and how one gets there."""

    name: str
    """What the app calls it: the mode in which it is in front, and the action that goes there."""
    key: str
    """The key that goes there, as Textual names it."""
    label: str
    """Its tab, in a word."""
    tip: str
    """What it is for, in one line."""
    of_run: bool = False
    """It shows the current run; where none is open, the app looks for the one that is meant."""
    code: str
    """``module:attribute``: a :class:`~eqat_tui.screens.base.WorkScreen`."""

    def load(self) -> Any:
        """Its class."""
        return load_named(self.code)

    def make(self) -> Any:
        """A new screen, as Textual wants it for a mode."""
        return self.load()()


SCREENS = Table(
    "screen",
    ScreenRow(
        name="setup",
        key="1",
        label="Setup",
        tip="Choose a model and settings, see the plan, start a run",
        code="eqat_tui.screens.setup:SetupScreen",
    ),
    ScreenRow(
        name="monitor",
        key="2",
        label="Monitor",
        tip="Watch the current run",
        of_run=True,
        code="eqat_tui.screens.monitor:MonitorScreen",
    ),
    ScreenRow(
        name="result",
        key="3",
        label="Result",
        tip="Perplexity, samples and exports of the current run",
        of_run=True,
        code="eqat_tui.screens.result:ResultScreen",
    ),
    ScreenRow(
        name="runs",
        key="4",
        label="Runs",
        tip="All runs: open, resume, compare, delete",
        code="eqat_tui.screens.runs:RunsScreen",
    ),
    ScreenRow(
        name="memory",
        key="5",
        label="Memory",
        tip="Memory and load of this machine, live",
        code="eqat_tui.screens.memory:MemoryScreen",
    ),
    ScreenRow(
        name="queue",
        key="6",
        label="Queue",
        tip="The queue of this machine and the sweeps: progress, order, comparison",
        code="eqat_tui.screens.queue:QueueScreen",
    ),
)


def key_of(name: str) -> str:
    """The key that goes to a screen, for sentences that send somebody there."""
    return SCREENS[name].key
