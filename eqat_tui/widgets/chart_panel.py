"""A chart with its title and the names of its lines, none of which is ever cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eqat_tui.charts import Series, chart, legend, legend_names
from eqat_tui.lines import Line, width_of
from eqat_tui.palette import Terminal
from eqat_tui.widgets.panel import Panel, entitle

BORDER = 2
"""Cells of the title's line that stay free for its ends."""


class ChartPanel(Panel):
    """A chart below a title."""

    def draw(
        self,
        title: str,
        series: Sequence[Series],
        terminal: Terminal,
        *,
        named: bool = True,
        marks: bool = False,
        **options: Any,
    ) -> None:
        """Draw ``series``; ``named`` tells them apart in the title, or above the chart where the title has no
        room for it. ``marks`` draws another character for each; ``options`` are those of
        :func:`~eqat_tui.charts.chart`."""
        width, height = self.size
        marked = marks or terminal.ascii_only
        above: list[Line] = []
        if named:
            names, above = place_names(title, series, width, marks=marked)
            entitle(self, title, *names)
        else:
            entitle(self, title)
        drawn = chart(
            series, width, height - len(above), ascii_only=terminal.ascii_only, marks=marks, **options
        )
        self.show([*above, *drawn])


def place_names(title: str, series: Sequence[Series], width: int, *, marks: bool) -> tuple[Line, list[Line]]:
    """The legend as it follows ``title`` on one line of ``width`` cells, or as lines of its own."""
    room = width - BORDER - width_of([(title, "")])
    for gap, mark_gap in (("   ", " "), (" ", " "), (" ", "")):
        names: Line = [(gap, ""), *legend(series, marks=marks, gap=gap, mark_gap=mark_gap)]
        if width_of(names) <= room:
            return names, []
    lines: list[Line] = []
    for one in legend_names(series, marks=marks):
        if lines and width_of(lines[-1]) + 2 + width_of([one]) <= width:
            lines[-1] += [("  ", ""), one]
        else:
            lines.append([one])
    return [], lines
