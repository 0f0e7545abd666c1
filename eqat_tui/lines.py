"""Text for the app's panels: lines of spans, each with a role that the palette gives a colour.

    [("Block-AP ", "strong"), ("12/30", "")]

What a screen shows is computed as such lines by plain functions, which tests read without a terminal, and the
widgets only paint them. A role never carries meaning that the words do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size

Span = tuple[str, str]
Line = list[Span]

ELLIPSIS = "…"


def line(*parts: str | Span) -> Line:
    """A line from texts and spans; a bare text has no role."""
    return [(part, "") if isinstance(part, str) else part for part in parts]


def plain(spans: Iterable[Span]) -> str:
    """The words of a line."""
    return "".join(text for text, _ in spans)


def width_of(spans: Iterable[Span]) -> int:
    """Cells that a line takes."""
    return sum(cell_len(text) for text, _ in spans)


def cut(spans: Iterable[Span], width: int) -> Line:
    """A line of at most ``width`` cells; an ellipsis shows that something is missing."""
    spans = list(spans)
    if width_of(spans) <= width:
        return spans
    if width <= 0:
        return []
    kept: Line = []
    room = width - 1
    for text, role in spans:
        size = cell_len(text)
        if size > room:
            kept.append((set_cell_size(text, room) + ELLIPSIS, role))
            break
        kept.append((text, role))
        room -= size
    return kept


def fit(spans: Iterable[Span], width: int) -> Line:
    """A line of exactly ``width`` cells."""
    spans = cut(spans, width)
    missing = width - width_of(spans)
    return [*spans, (" " * missing, "")] if missing > 0 else spans


def beside(left: Iterable[Span], right: Iterable[Span], width: int) -> Line:
    """``left`` at the left edge and ``right`` at the right one; where both do not fit, ``right`` is cut."""
    left, right = cut(left, width), list(right)
    room = width - width_of(left)
    if room < 2 or not right:
        return left
    right = cut(right, room - 1)
    return [*left, (" " * (room - width_of(right)), ""), *right]


def columns(
    rows: Sequence[Sequence[str | Span]], widths: Sequence[int], right: str = "", gap: str = "  "
) -> list[Line]:
    """Rows as aligned columns; ``right`` has an ``r`` for each right-aligned one."""
    lines = []
    for row in rows:
        spans: Line = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            text, role = (cell, "") if isinstance(cell, str) else cell
            text = plain(cut([(text, role)], width))
            pad = " " * (width - cell_len(text))
            padded = pad + text if index < len(right) and right[index] == "r" else text + pad
            spans += [(padded, role), (gap, "")]
        lines.append(spans[:-1])
    return lines


def widths_of(rows: Sequence[Sequence[str | Span]]) -> list[int]:
    """What each column needs."""
    if not rows:
        return []
    texts = [[cell if isinstance(cell, str) else cell[0] for cell in row] for row in rows]
    return [max(cell_len(row[index]) for row in texts) for index in range(len(texts[0]))]


def wrap(text: str, width: int, role: str = "") -> list[Line]:
    """``text`` in lines of at most ``width`` cells, broken between words where that is possible."""
    lines: list[Line] = []
    for paragraph in text.splitlines() or [""]:
        words, current = paragraph.split(" "), ""
        for word in words:
            joined = f"{current} {word}" if current else word
            if cell_len(joined) <= width or not current:
                current = joined
            else:
                lines.append([(current, role)])
                current = word
            while cell_len(current) > width > 0:
                head = set_cell_size(current, width)
                lines.append([(head, role)])
                current = current[len(head) :]
        lines.append([(current, role)])
    return lines


def bar(fraction: float | None, width: int, role: str = "accent") -> Line:
    """How much of something is done or full; a row of dots where that is not known."""
    if width <= 0:
        return []
    if fraction is None:
        return [("·" * width, "muted")]
    full = round(min(1.0, max(0.0, fraction)) * width)
    return [("█" * full, role), ("░" * (width - full), "muted")]
