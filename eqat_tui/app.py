"""The workbench: some screens (:mod:`eqat_tui.screens.table`) over the same files that the commands read.

The app holds no truth. A thread reads the current run twice a second (:mod:`eqat_tui.watcher`) and posts a
view; the screen that is in front shows it. Training is another process, so whatever happens to this one (a
crash, a lost connection, ``kill``) only ends the looking.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from textual.app import App, ScreenStackError, SystemCommand
from textual.binding import BindingType
from textual.events import Event, Key
from textual.filter import LineFilter, Monochrome, NoColor
from textual.notifications import SeverityLevel
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Input

from engine.errors import EqatError
from engine.run.directory import RunDirectory
from engine.run.sight import SeenFromAfar
from engine.system.printable import printable_lines
from eqat_tui.feed import Feed, LiveFeed, ReplayFeed, RunView
from eqat_tui.job_control import in_foreground, shell_waits
from eqat_tui.keys import ALWAYS, bindings, everywhere
from eqat_tui.palette import OUR_THEMES, THEMES, AsciiFilter, PrintableFilter, Terminal
from eqat_tui.screens.base import WorkScreen
from eqat_tui.screens.host import Host
from eqat_tui.screens.table import SCREENS, key_of
from eqat_tui.watcher import Looked, Watcher
from eqat_tui.which_run import likely
from eqat_tui.words import error_for_app

LONGEST_NOTE = 1000
"""Letters of a note; one that is longer covers the screen."""


def _note(text: str) -> str:
    return printable_lines(text if len(text) <= LONGEST_NOTE else f"{text[:LONGEST_NOTE]} …")


class EqatApp(App[str]):
    """The terminal app. It returns a line to print after it has left the screen."""

    TITLE = "eqat"
    CSS_PATH = "app.tcss"
    BINDINGS: ClassVar[list[BindingType]] = bindings(ALWAYS)
    NOTIFICATION_TIMEOUT = 5

    def __init__(
        self,
        *,
        runs_dir: Path,
        terminal: Terminal,
        run: RunDirectory | None = None,
        mode: str = "setup",
        read_only: bool = False,
        replay_speed: float | None = None,
        bell: bool = False,
    ) -> None:
        super().__init__()
        self.runs_dir = runs_dir
        self.terminal = terminal
        self.read_only = read_only
        self._bell = bell
        self.feed: Feed | None = None
        self.view: RunView | None = None
        self.looking = False
        self._watcher: Watcher | None = None
        self._first_run, self._first_mode, self._replay_speed = run, mode, replay_speed
        self._ascii, self._printable, self._no_colour = AsciiFilter(), PrintableFilter(), NoColor()
        self._typed_into: WeakKeyDictionary[Key, Widget | None] = WeakKeyDictionary()
        for theme in OUR_THEMES:
            self.register_theme(theme)
        self.theme = terminal.theme
        self.animation_level = "none"
        self.exit_code = 0
        for row in SCREENS:
            self.add_mode(row.name, row.make)
            self.bind(row.key, f"do('{row.name}')", description=row.label, show=False)

    # -- life --------------------------------------------------------------------------------------

    def on_mount(self) -> None:
        self._catch_signals()
        if self._first_run is not None:
            if self._replay_speed is not None:
                self.replay(self._first_run, self._replay_speed, show=False)
            else:
                self.open_run(self._first_run, show=False)
        self.switch_mode(self._first_mode)
        self._find_run_for(self._first_mode)

    def on_ready(self) -> None:
        if self._watcher is None or self.view is not None:
            gc.enable()  # see open_app

    def _catch_signals(self) -> None:
        """Textual takes neither, and would leave the terminal in its alternate screen."""
        if self._loop is None or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._loop.add_signal_handler(number, self._on_signal, number)
        if not self.is_headless:
            signal.signal(signal.SIGCONT, self._on_continued)

    def _on_continued(self, number: int, frame: object) -> None:
        """Signal handler: take the terminal back, which may hold anything and have another size now.

        It runs before the next line of the program does, as Textual's own does: until the terminal is taken
        back nothing may be written. Textual would count on what the terminal showed before, and not on a
        SIGSTOP, which nobody can prepare for.
        """
        driver = self._driver
        if driver is None or self._loop is None or not self._running:
            return
        if not in_foreground(sys.__stdin__):
            os.kill(os.getpid(), signal.SIGSTOP)  # `bg`: the terminal is not ours to draw on
            return
        if not getattr(driver, "_must_signal_resume", False):
            driver.suspend_application_mode()
        driver.resume_application_mode()
        self._loop.call_soon_threadsafe(self.repaint)

    def repaint(self) -> None:
        """Draw every cell again, whatever the terminal shows."""
        for screen in self.screen_stack:
            screen.refresh(layout=True)

    def _on_signal(self, number: int) -> None:
        self.exit_code = 128 + number
        self.leave()

    def on_unmount(self) -> None:
        if self._watcher is not None:
            self._watcher.end()

    def leave(self) -> None:
        """End the app; whatever runs goes on."""
        message = ""
        if self.view is not None and self.view.live:
            run = self.current()
            here = f"eqat attach {self.view.id[-4:]}"
            again = run.sight.types("attach") if isinstance(run, SeenFromAfar) else here
            message = f"{self.view.id} goes on;\n{again} shows it again"
        self.exit(message)

    def get_line_filters(self) -> Sequence[LineFilter]:
        filters = list(super().get_line_filters())
        if not self.terminal.colour:
            # Textual chooses before the theme is known, and would send 24-bit greys.
            filters = [one for one in filters if not isinstance(one, Monochrome)] + [self._no_colour]
        return [*filters, self._printable, *([self._ascii] if self.terminal.ascii_only else [])]

    # -- the current run ---------------------------------------------------------------------------

    def current(self) -> RunDirectory:
        """The run that is open."""
        assert self.feed is not None
        return self.feed.run

    def open_run(self, run: RunDirectory, *, show: bool = True, mode: str = "monitor") -> None:
        """Make ``run`` the current one."""
        self.show_feed(LiveFeed(run))
        if show:
            self.switch_mode(mode)

    def _find_run_for(self, mode: str) -> None:
        """Open the run that is meant on a screen that shows one, where none is open yet."""
        if self.feed is not None or self.looking or not SCREENS[mode].of_run:
            return
        self.looking = True

        def look() -> None:
            try:
                run = likely(self.runs_dir)
            finally:
                self.looking = False
            if self.is_running:
                self.call_from_thread(found, run)

        def found(run: RunDirectory | None) -> None:
            if run is not None and self.feed is None:
                self.open_run(run, show=False)
            elif isinstance(self.screen, WorkScreen):
                self.screen.refill()

        self.in_thread(look)

    def replay(self, run: RunDirectory, speed: float = 10.0, *, show: bool = True) -> None:
        """Show ``run`` from its beginning."""
        self.show_feed(ReplayFeed(run, speed))
        if show:
            self.switch_mode("monitor")

    def show_feed(self, feed: Feed) -> None:
        """Show what ``feed`` has from now on."""
        if self._watcher is not None:
            self._watcher.end()
        self.feed, self.view = feed, None
        self._watcher = Watcher(feed, self.post_message)
        self._watcher.start()

    def ring(self) -> None:
        """The terminal's bell, where the user wants to hear it."""
        if self._bell:
            self.bell()

    def look_now(self) -> None:
        """Show the effect of something the user did."""
        if self._watcher is not None:
            self._watcher.look_now()

    def on_looked(self, message: Looked) -> None:
        if message.feed is not self.feed:
            return  # of the run that was open before
        if self.view is None:
            gc.enable()
        self.view = message.view
        screen = self.screen_stack[0] if self.screen_stack else None
        if isinstance(screen, WorkScreen) and screen.is_mounted:
            screen.take(message.view)

    # -- doing -------------------------------------------------------------------------------------

    async def on_event(self, event: Event) -> None:
        if isinstance(event, Key) and not event.is_forwarded:
            self._typed_into[event] = self.focused
        await super().on_event(event)

    def on_key(self, event: Key) -> None:
        """Letters that came in one packet with the key that opened an input are meant for the input.

        They were handed to what had the focus when they arrived; they must neither be lost nor act as keys.
        """
        if isinstance(self.focused, Input) and self._typed_into.get(event) is not self.focused:
            event.prevent_default()
            self.post_message(event.copy())

    async def action_do(self, action: str) -> None:
        """A key of the app, where the screen has none of its own."""
        await self.do_everywhere(action)

    async def do_everywhere(self, action: str) -> None:
        """What works on every screen."""
        if action in SCREENS:
            self.clear_notifications()
            if action == self.current_mode and len(self.screen_stack) > 1:
                self.pop_screen()  # a comparison lies over the list of runs
            self._find_run_for(action)
            await self.switch_mode(action)
        elif action == "help":
            from eqat_tui.screens.help import help_for

            if isinstance(self.screen, WorkScreen):
                self.push_screen(help_for(self.screen))
        elif action == "palette":
            self.action_command_palette()
        elif action == "quit":
            self.leave()
        elif action == "how_to_leave":
            self.notify(f"q leaves the app, and runs go on; x on {key_of('monitor')} stops a run")
        elif action == "repaint":
            self.repaint()
        elif action == "suspend":
            if shell_waits():
                self.action_suspend_process()
            else:
                self.notify("no shell waits behind this terminal, so nothing could come back here; q leaves")

    def notify(
        self,
        message: str,
        *,
        title: str = "",
        severity: SeverityLevel = "information",
        timeout: float | None = None,
        markup: bool = False,
    ) -> None:
        """One note at a time: the newest is what the user waits for, and each one hides something.

        Notes are words and never markup, whatever ``markup`` says: Textual's widgets ask for it, and a note
        may hold the name of a file.
        """
        self.clear_notifications()
        super().notify(_note(message), title=_note(title), severity=severity, timeout=timeout, markup=False)

    def clear_notifications(self) -> None:
        """Take notes away with the lines that they had, which Textual leaves empty and never gives back."""
        super().clear_notifications()
        with suppress(ScreenStackError):  # before the first screen
            self.call_later(self._give_back, self.screen)

    def _give_back(self, screen: Screen[Any]) -> None:
        screen.query("ToastHolder").remove()

    def push_screen(self, *args: Any, **kwargs: Any) -> Any:
        """A dialog is not to be read through a note."""
        self.clear_notifications()
        return super().push_screen(*args, **kwargs)

    def start_engine(self, run: RunDirectory, start: Callable[[RunDirectory], int]) -> None:
        """Start an engine and show its run."""
        self.clear_notifications()  # they told of the one before

        def begin() -> None:
            start(run)
            self.call_from_thread(self.open_run, run)

        self.in_background(begin)

    def in_thread(self, work: Callable[[], Any]) -> None:
        """Do ``work`` on a thread that nobody waits for; what it raises is told.

        One that hangs on a network must not keep the app from ending, as the threads of a pool would.
        """

        def guarded() -> None:
            try:
                work()
            except Exception as error:
                if self.is_running:
                    self.call_from_thread(self.tell, error)

        threading.Thread(target=guarded, daemon=True).start()

    def in_background(self, work: Callable[[], Any], done: str = "") -> None:
        """Do something that may take a moment, say that it is ``done``, and show its effect."""

        def whole() -> None:
            work()
            if done:
                self.call_from_thread(self.notify, done)
            self.look_now()

        self.in_thread(whole)

    def tell(self, error: Exception) -> None:
        """Show what went wrong."""
        if isinstance(error, EqatError):
            text = error_for_app(error)
        elif isinstance(error, OSError):
            text = f"{error.filename or ''} {error.strerror or error}".strip()
        else:
            text = f"a bug: {type(error).__name__}: {error}"
        self.notify(text, title="that did not work", severity="error", timeout=12, markup=False)

    def copy_to_clipboard(self, text: str) -> None:
        """What is copied is what was seen: nobody pastes a control character without knowing."""
        super().copy_to_clipboard(printable_lines(text))

    def copy(self, text: str, what: str) -> None:
        """Put ``text`` on the terminal's clipboard, over SSH too where the terminal allows it (OSC 52)."""
        self.copy_to_clipboard(text)
        self.notify(f"{what}: sent to the terminal's clipboard", timeout=3)

    # -- palette and themes ------------------------------------------------------------------------

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        if isinstance(screen, WorkScreen):
            for key in screen.offered():
                yield self._command(screen, key.label, key.tip, key.action)
        for key in everywhere():
            if key.action != "palette":
                yield self._command(screen, key.label, key.tip, key.action)
        yield from self._elsewhere(screen)
        for theme in THEMES:
            yield SystemCommand(f"theme {theme}", f"Colours: {theme}", lambda theme=theme: self._use(theme))

    def _command(self, screen: Screen[Any], label: str, tip: str, action: str) -> SystemCommand:
        def run() -> None:
            self.run_worker(screen.run_action(f"do('{action}')"))

        return SystemCommand(label, tip, run)

    def _elsewhere(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """What the other screens can do: found here by name, done there."""
        for row in SCREENS:
            other: type[WorkScreen] = row.load()
            if not isinstance(screen, other):
                for key in other.KEYS:
                    words = f"{key.label} ({row.label}: {key.shown})"
                    yield self._command(screen, words, f"Go to {row.label}. {key.tip}", row.name)

    def _use(self, theme: str) -> None:
        self.theme = theme
        for mode in list(self._current_mode_screens()):
            mode.refill()

    def _current_mode_screens(self) -> Iterable[WorkScreen]:
        return [screen for screen in self.screen_stack if isinstance(screen, WorkScreen)]


if TYPE_CHECKING:

    def _as_host(app: EqatApp) -> Host:
        """The app offers what screens ask of it; mypy says so where it does not."""
        return app
