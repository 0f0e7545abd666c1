"""The two kinds of charts of a page, as SVG inside of it: lines over a number, and one mark a name.

Libraries that draw either load a numerical stack or ship scripts; a page that has to open from a mail, in ten
years, on paper, wants neither. Whatever a run's log may hold can be drawn: a gap breaks a line, and what was
not a finite number is a ``!`` on the x axis, where it happened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from eqat_tui.charts import LARGEST, Series
from eqat_tui.output import cell, format_number
from eqat_tui.report.markup import Html, join, tag

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 12, 40
DASHES = ("", "7 4", "2 4", "9 3 2 3")
"""One a series in turn, for whoever does not see its colour."""
MOST_MARKED = 40
"""Points of a series that are marked one by one."""
MOST_TICKS = 8
ROW = 30
LETTER = 6.6
"""About the width of a letter of 12 pixels."""
MOST_NAME = 30


class Axis(NamedTuple):
    """The range of numbers on an axis, and where it lies in the picture."""

    low: float
    high: float
    log: bool
    begin: float
    end: float

    def place(self, value: float) -> float:
        """Where ``value`` lies; at an end of the axis where it is beyond it."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        span = high / 2 - low / 2  # halves: a difference may be beyond all numbers
        share = (at / 2 - low / 2) / span if span else 0.5
        return self.begin + (self.end - self.begin) * min(1.0, max(0.0, share))

    def ticks(self) -> list[float]:
        """Round numbers on it."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str,
    log: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    """A chart of lines; nothing where there is nothing to draw."""
    drawn = [(one, _drawable(one, log)) for one in series]
    points = [point for _, found in drawn for point in found if point is not None]
    broken = [x for one in series for x, y in one.points if y is not None and not abs(y) < LARGEST]
    if not points:
        return None
    x_axis = _axis([x for x, _ in points], False, LEFT, WIDTH - RIGHT)
    values = [y for _, y in points]
    y_axis = _axis([*values, 0.0] if from_zero else values, log, HEIGHT - BOTTOM, TOP)
    body = [_grid(x_axis, y_axis, x_name)]
    for index, (one, found) in enumerate(drawn):
        body += [_line(one, found, x_axis, y_axis, _dash(index))]
    body += [
        tag("text", "!", x=x_axis.place(x), y=HEIGHT - BOTTOM - 2, text_anchor="middle", class_="bad")
        for x in broken[:MOST_MARKED]
        if abs(x) < LARGEST
    ]
    legend, height = _legend([one for one, found in drawn if any(found)])
    said = "; ".join(_range_words(one, found) for one, found in drawn if any(found))
    return _figure(
        title, said + ("; not finite where marked with !" if broken else ""), [*body, legend], height
    )


class Mark(NamedTuple):
    """A number that has a name."""

    name: str
    value: float | None
    words: str
    series: int = 0


def marks(title: str, rows: Sequence[Mark], *, log: bool = False) -> Chart | None:
    """A bar for each number; on a logarithmic axis, which has no zero for a bar to begin at, a dot."""
    shown = [row for row in rows if row.value is not None and 0 < row.value < LARGEST]
    if not shown:
        return None
    values = [row.value for row in shown if row.value is not None]
    room = LETTER * min(MOST_NAME, max(len(row.name) for row in shown))
    left = min(WIDTH * 0.45, room + 10)
    right = WIDTH - LETTER * max(len(row.words) for row in shown) - 14
    bottom = TOP + ROW * len(shown)
    axis = _axis(values if log else [*values, 0.0], log, left, max(right, left + 60))
    body: list[Html] = []
    for index, row in enumerate(shown):
        y = TOP + ROW * index + ROW / 2
        end = axis.place(row.value or 0.0)
        fill = f"fill{row.series % 4 + 1}"
        body.append(
            tag("text", cell(row.name, MOST_NAME), x=left - 8, y=y + 4, text_anchor="end", class_="name")
        )
        if log:
            body.append(tag("line", x1=left, x2=axis.end, y1=y, y2=y, class_="grid"))
            body.append(tag("circle", cx=end, cy=y, r=5, class_=fill))
        else:
            wide = max(1.0, end - left)
            body.append(tag("rect", x=left, y=y - 8, width=wide, height=16, rx=2, class_=fill))
        body.append(tag("text", row.words, x=end + 10, y=y + 4, class_="value"))
    said = "; ".join(f"{row.name} {row.words}" for row in shown)
    return _figure(title, said, body, bottom + TOP)


class Chart(Html):
    """A figure of a page, which is a file of its own as well (:mod:`eqat_tui.report.pictures`)."""

    caption: str
    said: str
    """What it shows, for who hears it."""
    body: Html
    """What is in the picture."""
    height: float
    """Of the picture, which is ``WIDTH`` wide."""


def _figure(title: str, said: str, body: Sequence[Html], height: float) -> Chart:
    picture = tag(
        "svg",
        tag("title", title),
        tag("desc", said),
        *body,
        role="img",
        aria_label=f"{title}: {said}",
        viewBox=f"0 0 {WIDTH} {height:.0f}",
    )
    chart = Chart(tag("figure", tag("figcaption", title), picture))
    chart.caption, chart.said, chart.body, chart.height = title, said, join(*body), height
    return chart


# -- lines ---------------------------------------------------------------------------------------------


def _drawable(one: Series, log: bool) -> list[tuple[float, float] | None]:
    """The points of a series; ``None`` where its line is broken."""
    return [
        (float(x), float(y))
        if y is not None and abs(x) < LARGEST and abs(y) < LARGEST and (y > 0 or not log)
        else None
        for x, y in one.points
    ]


def _line(
    one: Series, points: Sequence[tuple[float, float] | None], x_axis: Axis, y_axis: Axis, dash: str
) -> Html:
    """The line through the points; a point between two gaps is a dot."""
    places = [(x_axis.place(p[0]), y_axis.place(p[1])) if p is not None else None for p in points]
    steps, gap = [], True
    for index, place in enumerate(places):
        if place is not None:
            alone = gap and (index + 1 == len(places) or places[index + 1] is None)
            steps.append(f"{'M' if gap else 'L'}{place[0]:.1f} {place[1]:.1f}{'h0' if alone else ''}")
        gap = place is None
    role = one.role if one.role in _ROLES else _ROLES[0]
    fill = role.replace("series", "fill")
    found = [place for place in places if place is not None]
    dots = [tag("circle", cx=x, cy=y, r=2.5, class_=fill) for x, y in found if len(found) <= MOST_MARKED]
    return join(tag("path", d=" ".join(steps), class_=f"line {role}", stroke_dasharray=dash or None), *dots)


def _dash(index: int) -> str:
    """Colours come again after four series, and with another dash then."""
    return DASHES[(index + index // 4) % len(DASHES)]


_ROLES = ("series1", "series2", "series3", "series4")


def _grid(x_axis: Axis, y_axis: Axis, x_name: str) -> Html:
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", format_number(value, 3), x=LEFT - 6, y=y + 4, text_anchor="end"))
    for value in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(tag("line", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="grid"))
        parts.append(tag("text", format_number(value), x=x, y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    return join(*parts, tag("text", x_name, x=middle, y=HEIGHT - 6, text_anchor="middle"))


def _legend(series: Sequence[Series]) -> tuple[Html, float]:
    """The names below the chart, each behind a piece of its line, and how high the picture is with them."""
    parts, x, y = [], float(LEFT), float(HEIGHT + 12)
    for index, one in enumerate(series):
        name = cell(one.name, MOST_NAME)
        size = 34 + LETTER * len(name) + 14
        if x + size > WIDTH and x > LEFT:
            x, y = float(LEFT), y + 18
        role = one.role if one.role in _ROLES else _ROLES[0]
        dash = _dash(index)
        path = f"M{x:.1f} {y - 4:.1f}h26"
        parts.append(tag("path", d=path, class_=f"line {role}", stroke_dasharray=dash or None))
        parts.append(tag("text", name, x=x + 32, y=y, class_="name"))
        x += size
    return join(*parts), y + 8


def _range_words(one: Series, points: Sequence[tuple[float, float] | None]) -> str:
    """A series for who hears the page: where it begins and ends."""
    found = [point[1] for point in points if point is not None]
    first, last = format_number(found[0]), format_number(found[-1])
    return f"{cell(one.name)}: {len(found)} values, {first} first, {last} last"


# -- axes ----------------------------------------------------------------------------------------------


def _axis(values: Sequence[float], log: bool, begin: float, end: float) -> Axis:
    """An axis over the values, which are finite, and on a logarithmic one positive."""
    low, high = min(values), max(values)
    if log:
        if high / 1.05 <= low:
            low, high = low / 1.1, min(high * 1.1, LARGEST)
        return Axis(low or 5e-324, high, True, begin, end)
    if not high / 2 - low / 2 > 1e-9 * max(abs(low), abs(high)):
        margin = max(abs(high) * 0.05, 1e-9)
        low, high = low - margin, high + margin
    return Axis(low, high, False, begin, end)


def _ticks(low: float, high: float) -> list[float]:
    rough = (high / 2 - low / 2) / 2
    size = 10.0 ** math.floor(math.log10(rough)) if rough > 1e-300 else 0.0
    step = next((size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough), size)
    if not 0 < step < LARGEST or step <= 1e-12 * max(abs(low), abs(high)):
        return [low, high]
    first = math.ceil(low / step)
    found = [(first + index) * step for index in range(MOST_TICKS)]
    return [value for value in found if value <= high * (1 + 1e-12) + step * 1e-9]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; where there are few, numbers between them too."""
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((top - bottom) / MOST_TICKS))
    powers = range(max(bottom, -300), min(top, 300) + 1, every)
    for parts in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [m * 10.0**power for power in powers for m in parts if low <= m * 10.0**power <= high]
        if len(found) >= 3 or every > 1:
            return found
    return _ticks(low, high)
