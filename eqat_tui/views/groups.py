"""The queue and the sweeps as one list: a line for each group, and below it one for each of its runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from engine.config.stages import phase_label
from engine.run.members import WAITING
from eqat_tui.groups import Group, Row
from eqat_tui.lines import Line, Span, bar, cut, fit, line, plain, width_of, wrap
from eqat_tui.measured import newest
from eqat_tui.output import format_clock, format_number
from eqat_tui.run_text import shorten
from eqat_tui.views.monitor import STATE_MARKS, STATE_ROLES
from eqat_tui.words import block_place

BAR = 10
"""Cells of a group's progress."""
BESIDE = 17
"""Cells of a row for its mark, its number, its perplexity and what lies between."""


class Item(NamedTuple):
    """A line of the list."""

    group: Group
    row: Row | None
    """None of the line of the group itself."""

    @property
    def key(self) -> tuple[str, int]:
        """What it is known by, whatever moves."""
        return self.group.name, self.row.number if self.row is not None else 0


def items(groups: Sequence[Group], folded: Collection[str]) -> list[Item]:
    """The lines that are to be seen."""
    found: list[Item] = []
    for group in groups:
        found.append(Item(group, None))
        if group.name not in folded:
            found += [Item(group, row) for row in group.rows]
    return found


def rows(shown: Sequence[Item], folded: Collection[str], marked: Collection[str], width: int) -> list[Line]:
    """Each item as a line."""
    made = [item.row for item in shown if item.row is not None]
    widest = max((width_of([(row.what, "")]) for row in made), default=0)
    states = max((width_of([_state(row)]) for row in made), default=0)
    room = max(12, min(widest, width - states - BESIDE))
    return [
        cut(_group(item.group, item.group.name in folded), width)
        if item.row is None
        else cut(_row(item.row, marked, room), width)
        for item in shown
    ]


def _group(group: Group, folded: bool) -> Line:
    mark = "+" if folded and group.rows else "-" if group.rows else " "
    if group.problem:
        return line((f"{mark} {group.title}", "strong"), (f"  cannot be read: {group.problem}", "bad"))
    if not group.rows:
        return line(
            (f"{mark} {group.title}", "strong"), ("  empty: eqat queue add PRESET adds a run", "muted")
        )
    words, role = _working(group)
    ended = "over" if group.is_queue else "done"
    return [
        *line((f"{mark} {group.title}  ", "strong")),
        *bar(group.share, BAR),
        *line(f"  {group.over} of {len(group.rows)} {ended}", (f"  {words}", role)),
    ]


def _working(group: Group) -> tuple[str, str]:
    """Whether it goes on by itself."""
    now = any(row.turn == "now" for row in group.rows)
    left = any(row.turn != "over" for row in group.rows)
    if group.paused:
        return ("paused, after the run at work" if now else "paused"), "warn"
    if group.worker:
        return "at work", "accent"
    if group.is_queue:
        return ("nobody works on it" if left else ""), "warn"
    return ("run at work" if now else ""), "muted"


def _row(row: Row, marked: Collection[str], room: int) -> Line:
    mark = "*" if row.run is not None and row.run.id in marked else " "
    perplexity = newest(row.summary["perplexity"]) if row.summary is not None else None
    value = format_number(perplexity) if perplexity is not None else ""
    what = plain(fit([(row.what, "")], room))
    return [(f"{mark} {row.number:>3}  {what}  ", ""), _state(row), (f"  {value}".rstrip(), "")]


def _state(row: Row) -> Span:
    """Its state, and where a run at work is."""
    words = f"{STATE_MARKS.get(row.state, '·' if row.state == WAITING else '?')} {row.state}"
    summary = row.summary
    if row.turn == "now" and summary is not None:
        if summary["waiting"]:
            words = "‖ paused: disk full"
        elif summary["phase"]:
            words += f" {phase_label(summary['phase'])}"
            if summary["blocks"] and summary["block"] is not None:
                words += f" {block_place(summary['block'], summary['blocks'])}"
        if summary["eta_s"] is not None and summary["eta_s"] >= 1:
            words += f", {format_clock(summary['eta_s'])} left"
    return words, STATE_ROLES.get(row.state, "muted")


def details(item: Item | None, width: int) -> list[Line]:
    """Three lines on what is under the cursor."""
    if item is None:
        return [line(), line(), line()]
    group, row = item.group, item.row
    if row is None:
        told = group.problem or (_advice(group) if group.is_queue else "= compares its runs, or those marked")
        head = line((group.title, "strong"), (f"  {len(group.rows)} runs", "muted"))
        return [
            cut(one, width) for one in (head, line((shorten(group.path), "muted")), line((told, "muted")))
        ]
    name = row.run.id if row.run is not None else "not made yet" if row.turn == "waiting" else "no run"
    lines = [line((name, "strong"), (f"  {row.number} of {group.title}", "muted")), line((row.what, "muted"))]
    if row.error:
        lines.append(line((row.error, "bad")))
    elif group.is_queue and row.state in ("stopped", "aborted") and row.turn == "over":
        lines.append(line((f"was {row.state} and stays so; r gives it another turn", "warn")))
    else:
        lines.append(line((shorten(str(row.run.path)) if row.run is not None else "", "muted")))
    return [cut(one, width) for one in lines]


def _advice(group: Group) -> str:
    if group.paused:
        return "r goes on"
    left = any(row.turn != "over" for row in group.rows)
    if left and not group.worker:
        return "nobody works on it, after a restart of this machine perhaps: r goes on"
    return "made one after the other, whoever is logged in" if left else "eqat queue add PRESET adds a run"


def nothing_here(width: int) -> list[Line]:
    """While the first look is on its way."""
    return [*wrap("looking …", width, "muted"), line(), line()]
