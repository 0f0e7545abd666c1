"""Line charts made of characters: braille dots where a terminal has them, one mark a cell in ASCII.

Pure functions from numbers to :mod:`eqat_tui.lines`. A loss can be anything: a gap (``None``) breaks the
line, and NaN or an infinity is marked with ``!`` on the x axis where it happened, because a chart that leaves
it out would hide the one thing that matters. Libraries for this draw neither gaps nor ASCII, and their output
costs a slow connection three times as many bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from eqat_tui.lines import Line, cut, line, width_of
from eqat_tui.output import format_number

MARKS = "*o+x#@%&=~^$!?<>vwzsnmuceh"
"""One a series, for terminals without braille and where colour cannot tell series apart."""
LARGEST = 1e300
"""What is larger is as good as infinite, and differences of two such numbers are."""
LABEL = 8
"""Cells of the y axis' labels."""

# Bit of each dot of a braille cell, by (column, row) from the top left.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


class Series(NamedTuple):
    """Points by ascending ``x``; ``None`` for ``y`` is a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]
    role: str = "series1"


class Axis(NamedTuple):
    """The range of one axis, and whether it is logarithmic."""

    low: float
    high: float
    log: bool = False

    def places(self, size: int) -> Callable[[float], int]:
        """From a value to where it lies among ``size`` positions, the lowest being 0."""
        low, high = self.low, self.high
        if self.log:
            low, high = math.log10(low), math.log10(high)
        step = (size - 1) / (high - low) if high > low else 0.0
        if step > LARGEST:  # between two numbers that are as good as one
            step = 0.0
        last, middle, log = size - 1, 0.0 if step else (size - 1) / 2, self.log

        def place(value: float) -> int:
            position = ((math.log10(value) if log else value) - low) * step + middle
            return min(last, max(0, round(position)))

        return place

    def value(self, share: float) -> float:
        """The value at ``share`` of the way up."""
        if self.log:
            return float(10 ** (math.log10(self.low) * (1 - share) + math.log10(self.high) * share))
        return self.low + share * (self.high - self.low)


def chart(
    series: Sequence[Series],
    width: int,
    height: int,
    *,
    log: bool = False,
    ascii_only: bool = False,
    marks: bool = False,
    x_name: str = "",
    x_range: tuple[float, float] | None = None,
    y_from_zero: bool = False,
    y_top: float | None = None,
) -> list[Line]:
    """A chart of ``height`` lines and ``width`` cells; the last line is the x axis.

    ``marks`` draws a different character for each series, for where colours cannot be told apart; ``y_top``
    is a value that the y axis reaches, whatever the points do.
    """
    rows, inner = height - 1, width - LABEL - 1
    shown = [(one, _finite(one.points, log)) for one in series]
    points = [point for _, found in shown for point in found if point[1] is not None]
    # An axis is drawn between numbers that have a difference.
    if x_range is not None and not all(_drawn(x) for x in x_range):
        x_range = None
    if rows < 2 or inner < 4:
        return [line()] * max(0, height)
    if not points:
        return _empty(series, width, height)
    values = [y for _, y in points if y is not None]
    y_axis = _y_axis(values if y_top is None else [*values, y_top], log, y_from_zero)
    low, high = x_range or (min(x for x, _ in points), max(x for x, _ in points))
    low, high = float(low), float(high)
    x_axis = Axis(low, high if high > low else low + max(1e-9, abs(low) * 1e-9))
    cells: dict[tuple[int, int], tuple[int, str, str]] = {}
    one_cell = ascii_only or marks
    fine_x, fine_y = (inner, rows) if one_cell else (2 * inner, 4 * rows)
    for index, (one, found) in enumerate(shown):
        mark = MARKS[index % len(MARKS)]
        for x, y in _dots(found, x_axis, y_axis, fine_x, fine_y):
            if one_cell:
                cells[x, rows - 1 - y] = (0, mark, one.role)
            else:
                place = (x // 2, rows - 1 - y // 4)
                bits = cells.get(place, (0, "", ""))[0] | _DOTS[x % 2][3 - y % 4]
                cells[place] = (bits, "", one.role)
    labels = _labels(y_axis, rows)
    lines = [_row(cells, labels.get(row, ""), row, inner) for row in range(rows)]
    broken = [x for one in series for x, y in one.points if _is_broken(y) and _drawn(x)]
    return [*lines, _x_line(x_axis, x_name, inner, broken)]


def legend(series: Sequence[Series], *, marks: bool, gap: str = "   ", mark_gap: str = " ") -> Line:
    """Names of the series on one line, each with its mark or a dash in its colour."""
    spans: Line = []
    for one in legend_names(series, marks=marks, mark_gap=mark_gap):
        spans += [one, (gap, "")]
    return spans[:-1]


def legend_names(series: Sequence[Series], *, marks: bool, mark_gap: str = " ") -> Line:
    """The names alone, a span each."""
    return [
        (f"{MARKS[index % len(MARKS)] if marks else '━'}{mark_gap}{one.name}", one.role)
        for index, one in enumerate(series)
    ]


def _is_broken(value: float | None) -> bool:
    return value is not None and not abs(value) < LARGEST


def _finite(points: Sequence[tuple[float, float | None]], log: bool) -> list[tuple[float, float | None]]:
    """Points with whatever cannot be drawn turned into gaps."""
    return [
        (x, y if y is not None and _drawn(y) and (y > 0 or not log) else None) for x, y in points if _drawn(x)
    ]


def _drawn(value: float) -> bool:
    """False for infinities, NaN, and whole numbers of hundreds of digits."""
    return abs(value) < LARGEST


def _y_axis(values: Sequence[float], log: bool, from_zero: bool) -> Axis:
    low, high = min(values), max(values)
    if log:
        if high / low < 1.05:
            low, high = low / 1.05, high * 1.05
        return Axis(low, high, log=True)
    if from_zero:
        low = min(0.0, low)
    if high - low <= 1e-12 * max(abs(high), 1e-300):
        margin = abs(high) * 0.05 or 1.0
        low, high = low - margin, high + margin
    return Axis(low, high)


def _dots(
    points: Sequence[tuple[float, float | None]], x_axis: Axis, y_axis: Axis, width: int, height: int
) -> list[tuple[int, int]]:
    """The dots of a line through ``points``: in each column from its lowest to its highest, joined up."""
    spans: list[tuple[int, int, int, int, int]] = []  # column, first, last, lowest, highest
    joined: list[bool] = []
    gap = True
    column_of, row_of = x_axis.places(width), y_axis.places(height)
    for x, y in points:
        if y is None:
            gap = True
            continue
        column, row = column_of(x), row_of(y)
        if spans and spans[-1][0] == column and not gap:
            _, first, _, lowest, highest = spans[-1]
            spans[-1] = (column, first, row, min(lowest, row), max(highest, row))
        else:
            spans.append((column, row, row, row, row))
            joined.append(not gap)
        gap = False
    dots: list[tuple[int, int]] = []
    for index, (column, first, _, lowest, highest) in enumerate(spans):
        dots += [(column, row) for row in range(lowest, highest + 1)]
        if index and joined[index]:
            before = spans[index - 1]
            dots += _line(before[0], before[2], column, first)
    return dots


def _line(x0: int, y0: int, x1: int, y1: int) -> list[tuple[int, int]]:
    """The dots between two dots."""
    steps = max(abs(x1 - x0), abs(y1 - y0))
    return [
        (x0 + round((x1 - x0) * step / steps), y0 + round((y1 - y0) * step / steps))
        for step in range(1, steps)
    ]


def _labels(axis: Axis, rows: int) -> dict[int, str]:
    """Text of the y axis by row: top, bottom, and in between where there is room."""
    wanted = [0, rows - 1] if rows < 5 else [0, rows // 2, rows - 1]
    return {row: _label(axis.value(1 - row / (rows - 1))) for row in wanted}


def _label(value: float) -> str:
    """A number with as many digits as its label has room for: one that is cut has lost its exponent."""
    texts = (format_number(value, digits) for digits in (4, 3, 2, 1))
    return next((text for text in texts if len(text) <= LABEL), "")


def _row(cells: dict[tuple[int, int], tuple[int, str, str]], label: str, row: int, inner: int) -> Line:
    spans: Line = [(label.rjust(LABEL), "muted"), ("┤" if label else "│", "muted")]
    for column in range(inner):
        bits, mark, role = cells.get((column, row), (0, "", ""))
        text = mark or (chr(0x2800 + bits) if bits else " ")
        if spans[-1][1] == role or text == " ":
            # A run of one colour, blanks included, is one span: each change of colour costs 20 bytes.
            spans[-1] = (spans[-1][0] + text, spans[-1][1])
        else:
            spans.append((text, role))
    return spans


def _x_line(axis: Axis, name: str, inner: int, broken: Sequence[float]) -> Line:
    """The x axis: its ends, its name, and where a number was not finite."""
    left, right = _whole(axis.low), _whole(axis.high)
    if len(left) + len(right) >= inner:  # half a number is another number
        left, right = "", right if len(right) <= inner else ""
    middle = f"{name}" if name else ""
    room = inner - len(left) - len(right)
    middle = middle.center(room) if len(middle) + 2 <= room else " " * max(0, room)
    text = list((left + middle + right)[:inner].ljust(inner))
    place = axis.places(inner)
    for x in broken:
        text[place(x)] = "!"
    spans: Line = [(" " * (LABEL + 1), "")]
    for letter in text:
        role = "bad" if letter == "!" else "muted"
        if spans[-1][1] == role:
            spans[-1] = (spans[-1][0] + letter, role)
        else:
            spans.append((letter, role))
    return spans


def _whole(value: float) -> str:
    whole = abs(value) < 1e12 and abs(value - round(value)) < 1e-6
    return str(round(value)) if whole else format_number(value, 3)


def _empty(series: Sequence[Series], width: int, height: int) -> list[Line]:
    broken = any(_is_broken(y) for one in series for _, y in one.points)
    words = ("! not a finite number yet", "bad") if broken else ("nothing to draw yet", "muted")
    text = cut([words], width)
    before = " " * max(0, (width - width_of(text)) // 2)
    lines = [line() for _ in range(height)]
    lines[(height - 1) // 2] = line(before, *text)
    return lines
