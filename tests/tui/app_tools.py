"""Running the app in a test, and reading its screen as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from textual.app import App
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widgets import Input
from waiting import PATIENCE

from engine.run.directory import RunDirectory
from engine.run.status import Status
from eqat_tui.app import EqatApp
from eqat_tui.feed import LiveFeed, Liveness, RunView
from eqat_tui.palette import ANSI_DARK, DARK, Terminal
from eqat_tui.widgets.panel import Panel

SNAPSHOTS = Path(__file__).parent / "snapshots"
PLAIN = Terminal(theme=DARK)
MONOCHROME = Terminal(theme=ANSI_DARK, colour=False, ascii_only=True)

Script = Callable[[Pilot[Any], EqatApp], Awaitable[None]]


def picture(app: App[Any]) -> str:
    """The screen as text, after all filters, as the terminal gets it."""
    rows = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in row).rstrip() for row in rows)


def drive(app: EqatApp, script: Script, size: tuple[int, int] = (80, 24), *, notes: bool = False) -> None:
    """Run ``app`` without a terminal and do what ``script`` says; ``notes`` draws what it tells."""

    async def run() -> None:
        async with app.run_test(size=size, notifications=notes) as pilot:
            await pilot.pause()
            try:
                await script(pilot, app)
            finally:
                await left(app)

    asyncio.run(run())


async def left(app: EqatApp) -> None:
    """End ``app`` as a user does.

    ``run_test`` alone takes the screens away while the app still reads its messages: what a thread saw of the
    run in that moment would be shown on a screen without widgets.
    """
    app.exit(app.return_value)  # that of a script which has left it already
    deadline = time.monotonic() + PATIENCE
    while app.is_running and time.monotonic() < deadline:
        await asyncio.sleep(0.01)


async def until(pilot: Pilot[Any], condition: Callable[[], bool]) -> None:
    """Let the app go on until ``condition`` holds; a test that waits in vain fails with the screen."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if condition():
            return
        await pilot.pause(0.02)
    raise AssertionError(f"did not happen in time; the screen shows\n{picture(pilot.app)}")


async def shown(pilot: Pilot[Any]) -> None:
    """Let the app go on until the screen in front shows the run; its titles are there before."""

    def took() -> bool:
        view = pilot.app.view  # type: ignore[attr-defined]
        return view is not None and getattr(pilot.app.screen, "_view", None) is view

    await until(pilot, took)
    await pilot.pause()


async def settled(pilot: Pilot[Any]) -> str:
    """The screen once it has stopped changing; on a busy machine what belongs to it comes in parts."""
    same, before = 0, picture(pilot.app)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        await pilot.pause(0.04)
        now = picture(pilot.app)
        same, before = (same + 1 if now == before else 0), now
        if same == 3:
            return now
    raise AssertionError(f"never stopped changing; the screen shows\n{before}")


async def asked(pilot: Pilot[Any], dialog: type[Screen[Any]]) -> Input:
    """The input of a dialog that a key has opened, once it takes keys."""
    app = pilot.app
    await until(pilot, lambda: isinstance(app.screen, dialog) and isinstance(app.focused, Input))
    assert isinstance(app.focused, Input)
    return app.focused


async def press(pilot: Pilot[Any], *keys: str) -> None:
    """Press keys one by one and let each take effect."""
    for key in keys:
        await pilot.press(key)
        await pilot.pause()


def words_of(panel: Panel) -> str:
    """What a panel shows."""
    return "\n".join("".join(text for text, _ in line) for line in panel.lines)


def _listen(app: EqatApp) -> None:
    """Keep what the app tells; on the screen only the newest note stays."""
    notes: list[str] = []
    tell = app.notify

    def notify(message: str, **options: Any) -> None:
        notes.append(message)
        tell(message, **options)

    app.notify = notify  # type: ignore[method-assign]
    app.notes = notes  # type: ignore[attr-defined]


class StillFeed:
    """One moment of a run, for ever."""

    def __init__(self, run: RunDirectory, view: RunView) -> None:
        self.run, self._view = run, view

    def poll(self) -> RunView:
        return self._view


def view_of(run: RunDirectory, liveness: Liveness, *, eta: float | None = None, **changes: Any) -> RunView:
    """The view of a recorded run, as if it were in this state ten seconds after its last event."""
    view = LiveFeed(run).poll()
    now = (view.state.last_t or 0.0) + 10
    status = Status(phase=view.state.phase or "", eta_s=eta, heartbeat=now - 3, pid=4242)
    state = msgspec.structs.replace(view.state, status=status)
    pid = 4242 if liveness in ("running", "hung") else None
    return msgspec.structs.replace(view, state=state, liveness=liveness, now=now, pid=pid, **changes)


def app_of(
    run: RunDirectory | None = None,
    view: RunView | None = None,
    *,
    mode: str = "monitor",
    terminal: Terminal = PLAIN,
    runs_dir: Path | None = None,
    read_only: bool = False,
) -> EqatApp:
    """The app on ``run``; with ``view`` it shows that moment of it."""
    app = EqatApp(
        runs_dir=runs_dir or Path("runs"),
        terminal=terminal,
        run=run if view is None else None,
        mode=mode,
        read_only=read_only,
    )
    _listen(app)
    if run is not None and view is not None:
        feed = StillFeed(run, view)
        app.call_later(app.show_feed, feed)
    return app


def told(app: EqatApp) -> list[str]:
    """What the app has notified."""
    notes: list[str] = app.notes  # type: ignore[attr-defined]
    return notes
