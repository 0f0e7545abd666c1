"""A block of lines that repaints only the ones that changed.

Over SSH every byte counts: a widget that is replaced as a whole costs 1 to 4 KB, a changed line of it some
100 bytes. So a panel compares the lines it is shown with those it has, and marks just these as dirty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from rich.segment import Segment
from textual import events
from textual.binding import BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from eqat_tui.lines import Line, Span, fit, line
from eqat_tui.palette import content, style_of
from eqat_tui.widgets.scrolling import SCROLL_KEYS, Scrolling


def paint(spans: Line, width: int, theme: str, base: Any, role: str = "") -> Strip:
    """A line as Textual draws it; ``role`` lies over the whole of it."""
    over = style_of(role, theme)
    segments = [Segment(text, base + style_of(name, theme) + over) for text, name in fit(spans, width)]
    return Strip(segments, width)


def entitle(widget: Widget, *parts: str | Span) -> None:
    """Give ``widget`` a title in its border: words and spans, never markup."""
    widget.border_title = content(line(*parts), widget.app.theme)


class Panel(Widget):
    """Lines of text."""

    DEFAULT_CSS = "Panel { height: auto; }"

    class Resized(Message):
        """The panel has another size and needs other lines."""

        def __init__(self, panel: Panel) -> None:
            self.panel = panel
            super().__init__()

    def __init__(self, *, id: str | None = None, classes: str | None = None, title: str = "") -> None:
        super().__init__(id=id, classes=classes)
        self.lines: list[Line] = []
        if title:
            entitle(self, title)

    def show(self, lines: Sequence[Line]) -> None:
        """Show ``lines``; what they leave of the panel is blank."""
        before, self.lines = self.lines, list(lines)
        if len(before) != len(self.lines) and self.styles.height is not None and self.styles.height.is_auto:
            self.refresh(layout=True)
            return
        changed = [
            row
            for row in range(max(len(before), len(self.lines)))
            if row >= len(before) or row >= len(self.lines) or before[row] != self.lines[row]
        ]
        if changed:
            self.refresh(*(Region(0, row, self.size.width, 1) for row in changed))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self.lines)

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        spans = self.lines[y] if y < len(self.lines) else []
        return paint(spans, width, self.app.theme, self.visual_style.rich_style)

    def on_resize(self, event: events.Resize) -> None:
        self.post_message(self.Resized(self))


class ScrollPanel(ScrollView, Scrolling, can_focus=True):
    """Lines that scroll, for texts longer than the screen."""

    BINDINGS: ClassVar[list[BindingType]] = SCROLL_KEYS
    DEFAULT_CSS = "ScrollPanel { height: 1fr; overflow-x: hidden; scrollbar-size-vertical: 1; }"

    def __init__(self, *, id: str | None = None, classes: str | None = None, title: str = "") -> None:
        super().__init__(id=id, classes=classes)
        self.lines: list[Line] = []
        self._follows = False
        if title:
            entitle(self, title)

    def show(self, lines: Sequence[Line], *, follow: bool = False) -> None:
        """Show ``lines``; ``follow`` stays at the end if that is where the reader is."""
        before, self.lines = self.lines, list(lines)
        self._follows = follow and self.scroll_offset.y >= len(before) - self.size.height
        if len(before) != len(self.lines):
            self._fit()
            self.refresh()
            return
        for row, (old, new) in enumerate(zip(before, self.lines, strict=True)):
            if old != new:
                self.refresh_line(row)

    def render_line(self, y: int) -> Strip:
        row = y + self.scroll_offset.y
        spans = self.lines[row] if row < len(self.lines) else []
        return paint(spans, self.size.width, self.app.theme, self.visual_style.rich_style)

    def on_resize(self, event: events.Resize) -> None:
        self._fit()

    def _fit(self) -> None:
        self.virtual_size = Size(self.size.width, len(self.lines))
        if self._follows:
            self.scroll_to(y=len(self.lines), animate=False, force=True, immediate=True)
