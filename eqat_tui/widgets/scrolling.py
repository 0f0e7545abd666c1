"""What scrolls, scrolls by every key at once.

Textual puts a scroll off until the next layout and counts the next one from where the view still is: of
thirty keys that arrive in one packet, as they do over a slow connection, most would be lost.
"""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.containers import ScrollableContainer, VerticalScroll
from textual.widget import Widget

SCROLL_KEYS: list[BindingType] = [
    Binding("up,k", "scroll_up", "Up", show=False),
    Binding("down,j", "scroll_down", "Down", show=False),
    Binding("pageup", "page_up", "Page up", show=False),
    Binding("pagedown", "page_down", "Page down", show=False),
    Binding("home,g", "scroll_home", "Top", show=False),
    Binding("end,G", "scroll_end", "Bottom", show=False),
]
"""The keys of a text that scrolls: those of a list, so that ``g`` and ``G`` are top and bottom everywhere."""


class Scrolling(Widget):
    """A widget whose keys scroll it without delay.

    It comes last among the bases of a class: Textual takes the style of the first.
    """

    def action_scroll_up(self) -> None:
        self._go(self.scroll_offset.y - 1)

    def action_scroll_down(self) -> None:
        self._go(self.scroll_offset.y + 1)

    def action_page_up(self) -> None:
        self._go(self.scroll_offset.y - self._page)

    def action_page_down(self) -> None:
        self._go(self.scroll_offset.y + self._page)

    def action_scroll_home(self) -> None:
        self._go(0)

    def action_scroll_end(self) -> None:
        self._go(self.max_scroll_y)

    @property
    def _page(self) -> int:
        return max(1, self.scrollable_content_region.height - 1)

    def _go(self, y: int) -> None:
        self.scroll_to(y=max(0, min(y, self.max_scroll_y)), animate=False, force=True, immediate=True)


class ScrollBox(ScrollableContainer, Scrolling, can_focus=True):
    """Widgets that scroll together."""

    BINDINGS: ClassVar[list[BindingType]] = SCROLL_KEYS


class ScrollText(VerticalScroll, Scrolling, can_focus=True):
    """One long widget that scrolls."""

    BINDINGS: ClassVar[list[BindingType]] = SCROLL_KEYS
