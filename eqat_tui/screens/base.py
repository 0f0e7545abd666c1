"""What all screens have in common: a bar on top, keys at the bottom, and one way to do things."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Input

from engine.errors import EqatError
from eqat_tui.feed import RunView
from eqat_tui.keys import Key, everywhere
from eqat_tui.lines import Line, line
from eqat_tui.screens.host import Host, host_of
from eqat_tui.screens.table import key_of
from eqat_tui.widgets.chrome import KeyBar, TopBar
from eqat_tui.widgets.panel import Panel

READ_ONLY = "this viewer was opened with --read-only"


class WorkScreen(Screen[None]):
    """What a row of :data:`~eqat_tui.screens.table.SCREENS` names, and what is shown in its place."""

    KEYS: ClassVar[tuple[Key, ...]] = ()
    ABOUT: ClassVar[str] = ""
    WRITES: ClassVar[frozenset[str]] = frozenset()
    """Actions that change something, which a read-only viewer may not."""
    FIRST: ClassVar[str] = ""
    """Of a screen that shows a run: the part that has the keys."""

    @property
    def eqat(self) -> Host:
        """The app, as what it offers to screens."""
        return host_of(self)

    def compose(self) -> ComposeResult:
        yield TopBar()
        yield from self.body()
        yield KeyBar()

    def body(self) -> Iterable[Widget]:
        """What lies between the two bars."""
        return ()

    def offered(self) -> Sequence[Key]:
        """The keys that the footer and the help show now."""
        return self.KEYS

    def why_not(self, action: str) -> str:
        """Why ``action`` cannot be done now; empty when it can."""
        if action in self.WRITES and self.eqat.read_only:
            return READ_ONLY
        return self.impossible(action)

    def impossible(self, action: str) -> str:
        """The screen's own reasons."""
        return ""

    async def action_do(self, action: str) -> None:
        """Every key and every command of the palette ends here."""
        if any(key.action == action for key in everywhere()):
            await self.eqat.do_everywhere(action)
            return
        if all(key.action != action for key in self.offered()):
            return  # a key of another state of this screen
        reason = self.why_not(action)
        if reason:
            key = next((key for key in self.KEYS if key.action == action), None)
            self.notify(reason, title=key.label if key else action, severity="warning", timeout=6)
            return
        try:
            result = getattr(self, f"do_{action}")()
            if result is not None:
                await result
        except (EqatError, OSError) as error:  # others may delete the run that is shown
            self.eqat.tell(error)
        self.refresh_bars()

    def no_run(self) -> Line:
        """What a screen of a run says while none is open."""
        if self.eqat.looking:
            return line(("looking for a run …", "muted"))
        where = self.eqat.runs_dir
        return line((f"There is no run in {where} yet: {key_of('setup')} sets one up.", "muted"))

    def shows_a_run(self, yes: bool) -> None:
        """Frames without anything in them are hidden; what is shown after all gets the keys."""
        appears = yes and self.has_class("-empty")
        self.set_class(not yes, "-empty")
        if appears and self.focused is None:
            self.call_after_refresh(lambda: self.query_one(self.FIRST).focus())

    def refresh_bars(self, right: Line | None = None) -> None:
        """Bring the two bars up to date."""
        if self.is_mounted and self.is_current:
            self.query_one(TopBar).say(self.eqat.current_mode, right)
            self.query_one(KeyBar).say(self.offered(), self.why_not)

    def on_screen_resume(self) -> None:
        self.refresh_bars()
        self.call_after_refresh(self._come_up)

    def _come_up(self) -> None:
        """Show what happened while another screen was in front, or while this one was being made."""
        if self.eqat.view is not None:
            self.take(self.eqat.view)
        self.refill()

    def on_panel_resized(self, message: Panel.Resized) -> None:
        """Another size needs other lines."""
        message.stop()
        if isinstance(message.panel, TopBar | KeyBar):
            self.refresh_bars()
        else:
            self.refill()

    def refill(self) -> None:
        """Compute all panels again: the size or the theme has changed."""

    def take(self, view: RunView) -> None:
        """A new view of the current run."""


def show_input(screen: Screen[Any], box: Input) -> None:
    """Show ``box`` and give it the keys at once.

    Over a slow connection ``/`` and the first letters of a word arrive together; a focus that comes a moment
    later would let those letters act as keys.
    """
    box.display = True
    screen.set_focus(box)
