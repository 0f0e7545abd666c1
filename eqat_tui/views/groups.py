"""The queue and the sweeps as one list: a line for each group, and below it one for each of its runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from engine.config.stages import phase_label
from engine.run.finding import shorten
from engine.run.members import WAITING
from eqat_tui.groups import Group, Row
from eqat_tui.lines import Line, Span, bar, cut, fit, line, plain, squeezed, width_of, wrap
from eqat_tui.measured import newest
from eqat_tui.output import counted, format_bits, format_bytes, format_clock, format_number, format_seconds
from eqat_tui.views.monitor import STATE_MARKS, STATE_ROLES
from eqat_tui.words import block_place

BAR = 10
"""Cells of a group's progress."""
BESIDE = 9
"""Cells of a row for its mark, its number, and what lies between."""
LEAST = 12
"""Cells for what a run is."""
MEASURED = ("ppl", "bits", "size", "time")


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


def rows(
    shown: Sequence[Item], folded: Collection[str], marked: Collection[str], width: int
) -> tuple[Line, list[Line]]:
    """A header, and each item as a line. What a run came to has columns, as far as there is room."""
    made = [item.row for item in shown if item.row is not None]
    sizes = _sizes(made, width)
    header = _cells("  ", "  #", [("", ""), ("state", ""), *((name, "") for name in MEASURED)], sizes)
    lines = [
        _group(item.group, item.group.name in folded, width)
        if item.row is None
        else _row(item.row, marked, sizes)
        for item in shown
    ]
    return cut(header, width), [cut(one, width) for one in lines]


def _sizes(made: Sequence[Row], width: int) -> list[int]:
    """Cells of the columns: what a run is, its state, and of what it came to as much as there is room for."""
    measured = [_measured(row) for row in made if row.turn != "now"]
    needed = [max([len(name), *(len(row[i]) for row in measured)]) for i, name in enumerate(MEASURED)]
    # Where a run at work is takes the room of what it has not come to yet.
    states = [width_of([_state(row)]) for row in made if row.turn != "now"]
    state = max([len("state"), *states])
    widest = max((width_of([(row.what, "")]) for row in made), default=0)
    sizes = [min(widest, max(LEAST, width - state - BESIDE)), state]
    for size in needed:
        if BESIDE + sum(sizes) + 2 * (len(sizes) - 2) + 2 + size > width and len(sizes) > 2:
            break
        sizes.append(size)
    spare = width - BESIDE - sum(sizes) - 2 * (len(sizes) - 2)
    return [max(LEAST, sizes[0] + min(0, spare)), *sizes[1:]]


def _cells(mark: str, number: str, cells: Sequence[Span], sizes: Sequence[int]) -> Line:
    first, state, *measured = cells
    line: Line = [(f"{mark}{number}  {plain(fit([first], sizes[0]))}  ", ""), *fit([state], sizes[1])]
    for (text, role), size in zip(measured, sizes[2:], strict=False):
        line.append((f"  {text:>{size}}", role))
    return line


def _measured(row: Row) -> list[str]:
    """What a run came to."""
    summary = row.summary
    if summary is None:
        return [""] * len(MEASURED)
    perplexity, size, seconds = newest(summary["perplexity"]), summary["size_bytes"], summary["seconds"]
    return [
        format_number(perplexity) if perplexity is not None else "",
        format_bits(summary["bits_per_weight"]) if size["quantized"] is not None else "",
        format_bytes(size["quantized"]) if size["quantized"] is not None else "",
        format_seconds(seconds) if seconds else "",
    ]


def _group(group: Group, folded: bool, width: int) -> Line:
    mark = "+" if folded and group.rows else "-" if group.rows else " "
    if group.problem:
        head = line((f"{mark} {group.title}", "strong"))
        return [*head, (squeezed(f"  cannot be read: {group.problem}", width - width_of(head)), "bad")]
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


def _row(row: Row, marked: Collection[str], sizes: Sequence[int]) -> Line:
    mark = " *" if row.run is not None and row.run.id in marked else "  "
    if row.turn == "now":
        what = plain(fit([(row.what, "")], sizes[0]))
        return [(f"{mark}{row.number:>3}  {what}  ", ""), _state(row)]
    measured = [(text, "") for text in _measured(row)]
    return _cells(mark, f"{row.number:>3}", [(row.what, ""), _state(row), *measured], sizes)


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
        told = squeezed(group.problem, width) or (
            _advice(group) if group.is_queue else "= compares its runs, or those marked"
        )
        head = line((group.title, "strong"), (f"  {counted(len(group.rows), 'run')}", "muted"))
        return [
            cut(one, width) for one in (head, line((shorten(group.path), "muted")), line((told, "muted")))
        ]
    name = row.run.id if row.run is not None else "not made yet" if row.turn == "waiting" else "no run"
    lines = [line((name, "strong"), (f"  {row.number} of {group.title}", "muted")), line((row.what, "muted"))]
    if row.error:
        lines.append(line((squeezed(row.error, width), "bad")))
    elif group.is_queue and row.state in ("stopped", "aborted") and row.turn == "over":
        lines.append(line((f"was {row.state} and stays so; r gives it another turn", "warn")))
    elif group.is_queue and row.state == "crashed" and row.turn == "waiting":
        lines.append(line(("was cut off, and goes on when the queue does", "warn")))
    else:
        lines.append(line((shorten(str(row.run.path)) if row.run is not None else "", "muted")))
    return [cut(one, width) for one in lines]


def compared(rows: Sequence[Row], most: int, *, newest_first: bool) -> list[Row]:
    """At most so many runs, in their order: those of the smallest perplexity, or the newest ones of a queue,
    whose runs can be of different models."""
    if newest_first:
        return list(rows[-most:])

    def perplexity(row: Row) -> float:
        found = newest(row.summary["perplexity"]) if row.summary is not None else None
        return found if found is not None else float("inf")

    kept = {row.number for row in sorted(rows, key=perplexity)[:most]}
    return [row for row in rows if row.number in kept]


def left_out(group: Group, count: int, most: int) -> str:
    """That only some runs of a group are compared, which, and where the others are seen."""
    if group.is_queue:
        return f"the newest {most} of {count} runs are compared; eqat compare takes any others"
    return f"the best {most} of {count} runs are compared; eqat sweep show {group.name} shows all"


def at_the_end(group: Group, row: Row, where: str) -> str:
    """Why an entry that waits cannot have its turn earlier, or later; empty where it can."""
    waiting = [one.number for one in group.rows if one.turn == "waiting"]
    first, last = waiting[:1] == [row.number], waiting[-1:] == [row.number]
    if where == "earlier" and first:
        return "it is the first of those that wait"
    return "it is the last of those that wait" if where == "later" and last else ""


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
