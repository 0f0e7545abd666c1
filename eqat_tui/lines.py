"""Text for the app's panels: lines of spans, each with a role that the palette gives a colour.

    [("Block-AP ", "strong"), ("step 12/30", "")]

What a screen shows is computed as such lines by plain functions, which tests read without a terminal, and the
widgets only paint them. A role never carries meaning that the words do not.

Most words are other people's. Whatever measures or cuts a text here makes it printable first, so that a line
is as wide as it says and nothing in it reaches the terminal as more than letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.cells import cell_len, get_character_cell_size, set_cell_size

from engine.system.printable import JOINERS, printable

Span = tuple[str, str]
Line = list[Span]

ELLIPSIS = "…"
LONGEST_TEXT = 20_000
"""Letters of a text that are shown: a log can hold megabytes, and nobody scrolls through them here."""
PER_CELL = 8
"""Letters that may share one cell; accents on accents could go on without end."""
SHORTEST_WORD = 16
"""Cells that are left of a path or an id where a line is too short for it."""
_WIDENS = "\ufe0f"
"""After a sign of text it makes an emoji of it, which is a cell wider."""


def line(*parts: str | Span) -> Line:
    """A line from texts and spans; a bare text has no role."""
    return [
        (printable(part), "") if isinstance(part, str) else (printable(part[0]), part[1]) for part in parts
    ]


def plain(spans: Iterable[Span]) -> str:
    """The words of a line."""
    return "".join(text for text, _ in spans)


def width_of(spans: Iterable[Span]) -> int:
    """Cells that a line takes."""
    return sum(cell_len(printable(text)) for text, _ in spans)


def cut(spans: Iterable[Span], width: int) -> Line:
    """A line of at most ``width`` cells; an ellipsis shows that something is missing."""
    kept: Line = []
    room = width
    for text, role in spans:
        # A name of 100 000 letters is not measured to the end to learn that it is too long.
        most = PER_CELL * max(1, room + 1)
        shown = printable(text[:most])
        size = cell_len(shown)
        kept.append((shown, role))
        if size > room or len(text) > most:
            return _ended(kept, width)
        room -= size
    return kept


def _ended(spans: Line, width: int) -> Line:
    """The beginning of a line that is too long, an ellipsis in its last cell."""
    if width <= 0:
        return []
    kept: Line = []
    room = width - 1
    for text, role in spans:
        size = cell_len(text)
        if size > room:
            return [*kept, (set_cell_size(text, room) + ELLIPSIS, role)]
        kept.append((text, role))
        room -= size
    return [*kept, (ELLIPSIS, "")]


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
    return [
        max(cell_len(printable(row[index][:LONGEST_TEXT])) for row in texts) for index in range(len(texts[0]))
    ]


def squeezed(text: str, room: int) -> str:
    """``text`` in ``room`` cells, as far as its longest words can be shortened in their middle for that.

    A path says where, and stands before what is wrong there: a line that is only cut loses just that.
    """
    text = printable(text[:LONGEST_TEXT])
    words, over = text.split(" "), cell_len(text) - room
    for index in sorted(range(len(words)), key=lambda one: -cell_len(words[one])):
        size = cell_len(words[index])
        if over <= 0 or size <= SHORTEST_WORD:
            break
        words[index] = _without_middle(words[index], max(SHORTEST_WORD, size - over))
        over -= size - cell_len(words[index])
    return " ".join(words)


def _without_middle(word: str, width: int) -> str:
    """The beginning and the end of a word that is wider than ``width``, with an ellipsis between them."""
    begin, used = len(word), 0
    while begin and used + cell_len(word[begin - 1]) <= width // 2:
        begin -= 1
        used += cell_len(word[begin])
    return set_cell_size(word, width - 1 - used).rstrip() + ELLIPSIS + word[begin:].strip("".join(JOINERS))


def in_few(text: str, width: int, most: int, role: str = "") -> list[Line]:
    """``text`` in at most ``most`` lines: its longest words give way before its end does."""
    lines = wrap(text, width, role)
    if len(lines) > most:  # of every line a part stays empty, since words are kept whole
        lines = wrap(squeezed(text, most * width * 3 // 4), width, role)
    return few(lines, most)


def wrap(text: str, width: int, role: str = "") -> list[Line]:
    """``text`` in lines of at most ``width`` cells, broken between words where that is possible.

    A word that leaves no room for a mark on a line of its own is broken where it stands: the mark before it
    must not have a line for itself.
    """
    lines: list[Line] = []
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} {ELLIPSIS} ({len(text) - LONGEST_TEXT:,} more letters)"
    for paragraph in re.split("\r\n|[\n\v\f\r]", text.removesuffix("\n")):
        current = ""
        for word in printable(paragraph.expandtabs(4)).split(" "):
            joined = f"{current} {word}" if current else word
            broken = cell_len(word) > width - 2 and cell_len(current) < width - 1
            if cell_len(joined) <= width or not current or broken:
                current = joined
            else:
                lines.append([(current, role)])
                current = word
            if cell_len(current) > width > 0:
                *full, current = _pieces(current, width)
                lines += [[(piece, role)] for piece in full]
        lines.append([(current, role)])
    return lines


def few(lines: list[Line], most: int) -> list[Line]:
    """At most ``most`` lines; the last is an ellipsis where there are more."""
    return lines if len(lines) <= most else [*lines[: most - 1], [(ELLIPSIS, "muted")]]


def _pieces(word: str, width: int) -> list[str]:
    """A word that is longer than a line, in parts of ``width`` cells."""
    pieces, begin, used = [], 0, 0
    for index, letter in enumerate(word):
        size = 1 if letter == _WIDENS else get_character_cell_size(letter)
        if index > begin and (used + size > width or index - begin >= PER_CELL * width):
            pieces.append(word[begin:index])
            begin, used = index, 0
        used += size
    # A joiner joins nothing over the end of a line, and alone it would be shown as an escape.
    return [piece.strip("".join(JOINERS)) for piece in (*pieces, word[begin:])]


def bar(fraction: float | None, width: int, role: str = "accent") -> Line:
    """How much of something is done or full; a row of dots where that is not known."""
    if width <= 0:
        return []
    if fraction is None:
        return [("·" * width, "muted")]
    full = round(min(1.0, max(0.0, fraction)) * width)  # not a number is nothing done
    return [("█" * full, role), ("░" * (width - full), "muted")]
