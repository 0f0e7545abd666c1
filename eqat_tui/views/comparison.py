"""Some runs side by side as the app shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.run.comparison import Compared, Difference, differing_settings, results
from eqat_tui.charts import Series
from eqat_tui.compare_text import MARK, row_name, row_values, sentences, setting_words
from eqat_tui.lines import Line, Span, columns, cut, line, widths_of, wrap

ENOUGH = 12
"""Cells in which the numbers of a run can be read; of values that are longer the beginning is shown."""


def differences(runs: Sequence[Compared], width: int) -> list[Line]:
    """What came of each run, then the settings that are not the same in all of them.

    Runs for which there is no room beside the others have a table of their own below: none is cut off.
    """
    found = Difference(runs)
    names = [line((f"{run.letter} ", f"{_role(i)} strong"), run.id) for i, run in enumerate(runs)]
    notes = [row for words in sentences(runs, found) for row in wrap(f"≠ {words}", width, "warn")]
    head: list[str | Span] = ["", *((run.letter, f"{_role(i)} strong") for i, run in enumerate(runs))]
    between: list[str | Span] = ["", *("" for _ in runs)]
    table = [head, *_results(runs, found), between, *_settings(runs)]
    sizes = widths_of(table)
    beside = _beside(len(runs), max(ENOUGH, width - sizes[0]), min(ENOUGH, max(sizes[1:], default=1)))
    lines = [*names, *notes]
    for first in range(1, len(runs) + 1, beside):
        part = slice(first, first + beside)
        room = max(8, (width - sizes[0] - 2 * beside) // beside)
        widths = [sizes[0], *(min(size, room) for size in sizes[part])]
        made = columns([[row[0], *row[part]] for row in table], widths)
        lines += [line(), *(cut(row, width) for row in made)]
    return lines


def _beside(runs: int, room: int, size: int) -> int:
    """How many runs stand beside each other, so many in each table that none is nearly empty."""
    tables = max(1, math.ceil(runs / max(1, room // (size + 2))))
    return max(1, math.ceil(runs / tables))


def _results(runs: Sequence[Compared], found: Difference) -> list[list[str | Span]]:
    """What came of each run; the best number is marked where they are of one thing."""
    table: list[list[str | Span]] = []
    for row in results(runs, found):
        if row.name != "of_full_precision":  # which needs more room than a terminal has
            cells: list[str | Span] = [
                (f"{words} {MARK}", "good") if index in row.best else words
                for index, words in enumerate(row_values(row))
            ]
            table.append([(row_name(row), "muted"), *cells])
    return table


def _settings(runs: Sequence[Compared]) -> list[list[str | Span]]:
    table: list[list[str | Span]] = [
        [(name, "muted"), *map(setting_words, values)] for name, values in differing_settings(runs).items()
    ]
    return table or [[("settings", "muted"), *("the same" for _ in runs)]]


def _role(index: int) -> str:
    return f"series{index % 4 + 1}"


def overlaid(runs: Sequence[Compared]) -> list[Series]:
    """Final loss per block of every run."""
    return [
        Series(
            run.letter,
            [(row.index, row.final_loss) for row in run.state.trained_blocks() if row.finished],
            _role(index),
        )
        for index, run in enumerate(runs)
    ]
