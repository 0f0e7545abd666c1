"""Runs side by side in words: why some numbers cannot be compared, and the table of ``eqat compare``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from engine.config.lists import list_words
from engine.config.stages import full_precision, stage_label
from engine.run.comparison import Compared, Difference, Row, differing_settings, results
from engine.run.events import Eval
from engine.run.shown import json_safe
from eqat_tui.divergence_text import share_words
from eqat_tui.output import (
    LONGEST_CELL,
    cell,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    one_line,
    table,
)
from eqat_tui.run_text import ANSWERS, LONGEST_SCORE, LONGEST_TASK
from eqat_tui.words import model_name

MARK = "◂"
"""Behind the best number of a row."""

MEASURES = {"kl": "KL from full precision", "top1": "same first token"}
"""Numbers of how far a version is from full precision."""


def sentences(runs: Sequence[Compared], found: Difference) -> list[str]:
    """What differs, and what is therefore not marked."""

    def each(words: Callable[[Compared], str]) -> str:
        return ", ".join(f"{run.letter} {words(run)}" for run in runs)

    said = [f"Of {run.letter} not all is known: {one_line(run.problem)}." for run in runs if run.problem]
    if found.models:
        of = each(lambda run: model_name(run.source))
        said.append(f"These are different models ({of}): no number of one is better than one of another.")
    if found.measures:
        how = each(lambda run: _conditions(run.measured))
        what = " and ".join(found.measures)
        said.append(f"Perplexity was measured with different {what}, none is marked: {how}.")
    if found.places and not found.models:
        said.append("They worked on different machines or devices: no time is marked.")
    if found.unfinished and not found.models:
        verb = "is" if len(found.unfinished) == 1 else "are"
        said.append(f"{', '.join(found.unfinished)} {verb} not finished: no time is marked.")
    return said


def _conditions(found: Eval | None) -> str:
    if found is None:
        return "not at all"
    begin = f", {found.begin}" if found.begin else ""
    return f"{found.corpus}, {format_count(found.tokens)} tokens at context {found.sequence_length}{begin}"


def row_name(row: Row) -> str:
    """What the numbers of a row are."""
    if row.text is not None:
        what = "perplexity" if row.name == "perplexity" else MEASURES[row.name]
        return f"{what} on {cell(row.text, LONGEST_TASK)}, {stage_label(row.stage or '')}"
    if row.name in MEASURES:
        return f"{MEASURES[row.name]}, {stage_label(row.stage or '')}"
    if row.name == "perplexity":
        label = stage_label(row.stage or "")
        return f"perplexity, {label}" if row.stage == full_precision() else label
    if row.name == "answer_perplexity":
        return f"{ANSWERS}, {stage_label(row.stage or '')}"
    if row.name == "score":
        return f"{cell(row.task or '', LONGEST_SCORE)}, {stage_label(row.stage or '')}"
    if row.name == "accuracy":
        return f"{cell(row.task or '', LONGEST_TASK)}, {stage_label(row.stage or '')}"
    return {"size_bytes": "size", "bits_per_weight": "bits per weight", "seconds": "time"}[row.name]


def row_values(row: Row) -> list[str]:
    """The numbers of a row in words."""
    words: dict[str, Callable[[float], str]] = {
        "size_bytes": format_bytes,
        "bits_per_weight": lambda value: format_number(value, 3),
        "seconds": format_seconds,
        "of_full_precision": lambda value: f"{format_number(value, 3)}×",
        "accuracy": share_words,
        "kl": lambda value: format_number(value, 3),
        "top1": share_words,
    }
    of = words.get(row.name, format_number)
    return ["–" if value is None else of(value) for value in row.values]


def setting_words(value: Any) -> str:
    """A value of a setting as one types it."""
    if value is None or value in ([], ()):
        return "none"
    return list_words(value) if isinstance(value, list | tuple) else str(value)


def table_rows(runs: Sequence[Compared], found: Difference) -> list[tuple[str, list[str], tuple[int, ...]]]:
    """Name, words and places of the best of every row; a perplexity says how many times that of full
    precision it is."""
    made = results(runs, found)
    shares = {row.stage: row_values(row) for row in made if row.name == "of_full_precision"}
    rows = []
    for row in made:
        if row.name == "of_full_precision":
            continue
        words = row_values(row)
        if row.name == "perplexity" and row.text is None and row.stage in shares:
            words = [
                f"{value} ({share})" if share != "–" else value
                for value, share in zip(words, shares[row.stage], strict=True)
            ]
        rows.append((row_name(row), words, row.best))
    return rows


def compare_text(runs: Sequence[Compared]) -> str:
    """The runs, what speaks against comparing them, and one table: results, then settings that differ."""
    found = Difference(runs)
    names = "\n".join(f"{run.letter}  {cell(run.id)}" for run in runs)
    notes = "\n".join(one_line(f"≠ {words}") for words in sentences(runs, found))
    rows = [
        (name, *(f"{value} {MARK}" if index in best else value for index, value in enumerate(values)))
        for name, values, best in table_rows(runs, found)
    ]
    settings = [
        (name, *(cell(setting_words(value), LONGEST_CELL // 4) for value in values))
        for name, values in differing_settings(runs).items()
    ] or [("settings", *("the same" for _ in runs))]
    empty = ("", *("" for _ in runs))
    listed = table([*rows, empty, *settings], header=("", *(run.letter for run in runs)))
    return "\n\n".join(part for part in (names, notes, listed) if part)


def compare_tree(runs: Sequence[Compared]) -> dict[str, Any]:
    """The same as plain JSON."""
    found = Difference(runs)
    tree = {
        "runs": [
            {
                "letter": run.letter,
                "id": run.id,
                "path": run.path,
                "model": run.source,
                "outcome": run.state.outcome,
                "device": run.state.device or None,
                "host": run.state.host or None,
                "evaluation": _measured_fields(run.measured),
                "problem": run.problem or None,
            }
            for run in runs
        ],
        "notes": sentences(runs, found),
        "results": [
            {**msgspec.to_builtins(row), "best": [runs[index].letter for index in row.best]}
            for row in results(runs, found)
        ],
        "settings": differing_settings(runs),
    }
    cleaned = json_safe(tree)
    assert isinstance(cleaned, dict)
    return cleaned


def _measured_fields(found: Eval | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {name: getattr(found, name) for name in ("corpus", "tokens", "sequence_length", "begin")}
