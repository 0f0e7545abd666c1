"""What screens, dialogs and widgets ask of the app that they are shown in.

They know this and not the app itself, which knows the screens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from textual.dom import DOMNode

    from engine.run.directory import RunDirectory
    from eqat_tui.feed import Feed, RunView
    from eqat_tui.palette import Terminal


class Host(Protocol):
    """The app, as far as a screen needs it. What goes wrong in its threads is told by :meth:`tell`."""

    runs_dir: Path
    """Where runs are kept."""
    terminal: Terminal
    """What the terminal can show."""
    read_only: bool
    """Nothing may be changed from here."""
    feed: Feed | None
    """Where the views of the current run come from, if one is open."""
    view: RunView | None
    """The latest of them."""
    looking: bool
    """No run was named, and the one that is meant is being looked for."""

    @property
    def current_mode(self) -> str:
        """Name of the screen that is in front; what lies over it does not count."""

    def current(self) -> RunDirectory:
        """The run that is open."""

    def open_run(self, run: RunDirectory, *, show: bool = True, mode: str = "monitor") -> None:
        """Make ``run`` the current one."""

    def replay(self, run: RunDirectory, speed: float = 10.0, *, show: bool = True) -> None:
        """Show ``run`` from its beginning."""

    def ring(self) -> None:
        """The terminal's bell, where the user wants to hear it."""

    def look_now(self) -> None:
        """Show the effect of something the user did."""

    def start_engine(self, run: RunDirectory, start: Callable[[RunDirectory], int]) -> None:
        """Start an engine and show its run."""

    def in_thread(self, work: Callable[[], Any]) -> None:
        """Do ``work`` on a thread that nobody waits for."""

    def in_background(self, work: Callable[[], Any], done: str = "") -> None:
        """Do something that may take a moment, say that it is ``done``, and show its effect."""

    def tell(self, error: Exception) -> None:
        """Show what went wrong."""

    def copy(self, text: str, what: str) -> None:
        """Put ``text`` on the terminal's clipboard."""

    async def do_everywhere(self, action: str) -> None:
        """Do what works on every screen, going to another one included."""

    def leave(self) -> None:
        """End the app; whatever runs goes on."""


def host_of(node: DOMNode) -> Host:
    """The app that ``node`` is shown in."""
    return cast(Host, node.app)
