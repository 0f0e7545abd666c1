"""A list of rows to move through: blocks, runs, models, settings.

Rows are lines (:mod:`eqat_tui.lines`), so a row that changes is one line sent to the terminal; a cell of a
table widget costs 2 KB. The cursor is a ``>`` as well as a colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from eqat_tui.lines import Line, line
from eqat_tui.widgets.panel import entitle, paint

CURSOR = "►"


class RowMessage(Message):
    """Something about a row of a list."""

    def __init__(self, panel: ListPanel, row: int) -> None:
        self.panel, self.row = panel, row
        super().__init__()

    @property
    def control(self) -> ListPanel:
        """The list it comes from."""
        return self.panel


class ListPanel(ScrollView, can_focus=True):
    """Rows with a cursor, below an optional header that does not scroll."""

    DEFAULT_CSS = "ListPanel { height: 1fr; overflow-x: hidden; scrollbar-size-vertical: 1; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home,g", "end(False)", "First", show=False),
        Binding("end,G", "end(True)", "Last", show=False),
        Binding("enter", "choose", "Choose", show=False),
    ]

    class Moved(RowMessage):
        """The cursor is on another row."""

    class Chosen(RowMessage):
        """Enter, or a click on the row of the cursor."""

    def __init__(
        self, *, id: str | None = None, classes: str | None = None, title: str = "", cursor: bool = True
    ) -> None:
        super().__init__(id=id, classes=classes)
        self.header: Line | None = None
        self.rows: list[Line] = []
        self.cursor = 0
        self.has_cursor = cursor
        if title:
            entitle(self, title)

    # -- what is shown -----------------------------------------------------------------------------

    def show(self, rows: Sequence[Line], *, header: Line | None = None) -> None:
        """Show ``rows``; the cursor stays on its row number, as far as there is one."""
        before, old_header = self.rows, self.header
        self.rows, self.header = list(rows), header
        moved = self.cursor
        self.cursor = max(0, min(self.cursor, len(self.rows) - 1))
        if len(before) != len(self.rows) or (old_header is None) != (header is None):
            self._fit()
            self.refresh()
        else:
            if old_header != header:
                self.refresh_line(self.scroll_offset.y)
            for row, (old, new) in enumerate(zip(before, self.rows, strict=True)):
                if old != new:
                    self._refresh_row(row)
        if moved != self.cursor:
            self.post_message(self.Moved(self, self.cursor))

    def move_to(self, row: int, *, tell: bool = True) -> None:
        """Put the cursor on ``row``."""
        row = max(0, min(row, len(self.rows) - 1))
        if row != self.cursor:
            before, self.cursor = self.cursor, row
            self._refresh_row(before)
            self._refresh_row(row)
            if tell:
                self.post_message(self.Moved(self, row))
        self._reveal()

    def _top(self) -> int:
        return 1 if self.header is not None else 0

    def _refresh_row(self, row: int) -> None:
        self.refresh_line(row + self._top())

    def _fit(self) -> None:
        self.virtual_size = Size(self.size.width, len(self.rows) + self._top())

    def _reveal(self) -> None:
        room = max(1, self.size.height - self._top())
        first = self.scroll_offset.y
        if self.cursor < first:
            self._scroll(self.cursor)
        elif self.cursor >= first + room:
            self._scroll(self.cursor - room + 1)

    def _scroll(self, y: int) -> None:
        """At once: the next key of a burst starts from here."""
        self.scroll_to(y=y, animate=False, force=True, immediate=True)

    def reveal_after(self, count: int) -> None:
        """Bring ``count`` rows after the cursor into view, as far as its own row stays there."""
        room = max(1, self.size.height - self._top())
        last = min(self.cursor + count, self.cursor + room - 1, len(self.rows) - 1)
        if last >= self.scroll_offset.y + room:
            self._scroll(last - room + 1)

    def render_line(self, y: int) -> Strip:
        base, theme, width = self.visual_style.rich_style, self.app.theme, self.size.width
        top = self._top()
        if y < top:
            return paint(
                line("  " if self.has_cursor else "", *(self.header or [])), width, theme, base, "muted"
            )
        row = y - top + self.scroll_offset.y
        if row >= len(self.rows):
            return Strip.blank(width, base)
        here = self.has_cursor and row == self.cursor
        mark = f"{CURSOR} " if here else "  "
        spans = line(mark, *self.rows[row]) if self.has_cursor else self.rows[row]
        return paint(
            spans, width, theme, base, "cursor" if here and self.has_focus else "strong" if here else ""
        )

    # -- moving ------------------------------------------------------------------------------------

    def action_move(self, by: int) -> None:
        self.move_to(self.cursor + by)

    def action_page(self, by: int) -> None:
        self.move_to(self.cursor + by * max(1, self.size.height - self._top() - 1))

    def action_end(self, last: bool) -> None:
        self.move_to(len(self.rows) - 1 if last else 0)

    def action_choose(self) -> None:
        if self.rows and self.has_cursor:
            self.post_message(self.Chosen(self, self.cursor))

    def on_click(self, event: events.Click) -> None:
        row = event.y - self._top() + self.scroll_offset.y
        if not self.has_cursor or not 0 <= row < len(self.rows):
            return
        if row == self.cursor:
            self.action_choose()
        else:
            self.move_to(row)

    def on_resize(self, event: events.Resize) -> None:
        self._fit()
        self._reveal()

    def on_focus(self) -> None:
        self._refresh_row(self.cursor)

    def on_blur(self) -> None:
        self._refresh_row(self.cursor)
