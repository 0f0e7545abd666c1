"""The first and the last line of every screen: where one is, and which keys there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from textual import events

from eqat_tui.keys import ALWAYS, Key, screen_keys
from eqat_tui.lines import Line, beside, line, width_of
from eqat_tui.widgets.panel import Panel


class TopBar(Panel):
    """``eqat  1 Setup  2 Monitor …`` and what the screen has to say at the right."""

    DEFAULT_CSS = "TopBar { dock: top; height: 1; background: $panel; }"

    def __init__(self) -> None:
        super().__init__(id="top-bar")
        self.right: Line = []

    def say(self, mode: str, right: Line | None = None) -> None:
        """Mark the tab of ``mode``."""
        if right is not None:
            self.right = right
        width = self.size.width
        made = [
            self._tabs(mode, name, short=short)
            for name, short in ((" eqat ", width < 70), (" ", width < 70), (" ", True))
        ]
        # What the screen has to say counts for more than whole names.
        room = width - width_of(self.right)
        tabs = next((tabs for tabs in made if width_of(tabs) < room), made[-1])
        self.show([beside(tabs, self.right, width)])

    def _tabs(self, mode: str, name: str, *, short: bool) -> Line:
        spans: Line = [(name, "strong")]
        for key in screen_keys():
            here = key.action == mode
            word = key.label[:3] if short else key.label
            label = f"[{key.shown} {word}]" if here else f" {key.shown} {word} "
            spans.append((label, "strong accent" if here else "muted"))
        return spans

    def on_click(self, event: events.Click) -> None:
        tabs = screen_keys()
        x = 0
        for index, (text, _) in enumerate(self.lines[0] if self.lines else []):
            x += len(text)
            if event.x < x:
                if 0 < index <= len(tabs):
                    self.screen.run_worker(self.screen.run_action(f"do('{tabs[index - 1].action}')"))
                return


class KeyBar(Panel):
    """The keys of the screen. What is in brackets cannot be done now; pressing it says why."""

    DEFAULT_CSS = "KeyBar { dock: bottom; height: 1; background: $panel; }"

    def __init__(self) -> None:
        super().__init__(id="key-bar")
        self._places: list[tuple[int, str]] = []

    def say(self, offered: Sequence[Key], why_not: Callable[[str], str]) -> None:
        """The keys that a screen offers, and why some of them cannot be used now.

        The ones for help and leaving are always there.
        """
        always = [key for key in ALWAYS if key.footer]
        last: Line = []
        for key in always:
            last += self._key(key, "")
        room = self.size.width - width_of(last)
        spans: Line = []
        self._places = []
        for key in offered:
            if not key.footer:
                continue
            made = self._key(key, why_not(key.action))
            if width_of(spans) + width_of(made) > room:
                continue  # a shorter one may still find room
            spans += made
            self._places.append((width_of(spans), key.action))
        blank = max(0, room - width_of(spans))
        x = width_of(spans) + blank
        for key in always:
            x += width_of(self._key(key, ""))
            self._places.append((x, key.action))
        self.show([line(*spans, " " * blank, *last)])

    def _key(self, key: Key, why_not: str) -> Line:
        if why_not:
            return [(f"({key.shown} {key.label})", "muted")]
        return [(f" {key.shown}", "key"), (f" {key.label} ", "")]

    def on_click(self, event: events.Click) -> None:
        action = next((action for end, action in self._places if event.x < end), None)
        if action is not None:
            self.screen.run_worker(self.screen.run_action(f"do('{action}')"))
