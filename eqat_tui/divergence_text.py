"""How far quantized versions are from full precision, and how good they are on other texts, as rows of words:
the report in a terminal, the page and the app show the same ones.

They are made from what ``eqat show --json`` prints (``divergence`` and ``texts``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.config.stages import full_precision, stage_label, versions
from eqat_tui.output import cell, format_count, format_number, table

Tree = Mapping[str, Any]
LONGEST_TEXT = 60
MOST_SHOWN = 20
"""Measurements that a report of a run lists; the JSON has all."""
HEAD = ("from full precision", "KL, nats", "same first token", "logit error", "largest")


def divergence_rows(divergence: Tree) -> list[tuple[str, ...]]:
    """A row a version under a head; nothing where nothing was compared."""
    rows = [
        (stage_label(stage), *divergence_words(found))
        for stage in versions(divergence)
        if (found := divergence.get(stage))
    ]
    return [HEAD, *rows] if rows else []


def divergence_words(found: Tree) -> tuple[str, str, str, str]:
    """The numbers of :data:`HEAD`."""
    return (
        format_number(found["kl"], 3),
        share_words(found["top1"]),
        format_number(found["logit_error"], 3),
        format_number(found["largest_logit_error"], 3),
    )


def share_words(value: float) -> str:
    """A share in percent; a damaged log may say anything."""
    return f"{100 * value:.1f} %" if abs(value) <= 10 else "–"


def text_rows(text: str, by_stage: Tree) -> list[tuple[str, ...]]:
    """Perplexity of every version on one text, times that of full precision, and the divergence from it."""
    base = (by_stage.get(full_precision()) or {}).get("perplexity")
    rows: list[tuple[str, ...]] = [
        (f"perplexity on {cell(text, LONGEST_TEXT)}", "", "of full precision", *HEAD[1:3])
    ]
    for stage in versions(by_stage):
        if found := by_stage.get(stage):
            value = found["perplexity"]
            ratio = f"{format_number(value / base, 3)}×" if value is not None and base else ""
            more = divergence_words(found["divergence"])[:2] if found.get("divergence") else ("", "")
            words = "not finite" if value is None else format_number(value)
            rows.append((stage_label(stage), words, ratio, *more))
    return rows if any(row[3] for row in rows[1:]) else [row[:3] for row in rows]


def tables(shown: Tree) -> Iterator[list[tuple[str, ...]]]:
    """Each of them that there is, its head first."""
    if rows := divergence_rows(shown.get("divergence") or {}):
        yield rows
    for text, by_stage in (shown.get("texts") or {}).items():
        yield text_rows(text, by_stage)


def as_text(rows: Sequence[tuple[str, ...]]) -> str:
    """For a terminal."""
    head, *others = [(f"  {first}", *more) for first, *more in rows]
    return table(others, header=head, right="l" + "r" * (len(head) - 1))


def result_rows(results: Sequence[Tree]) -> list[tuple[str, ...]]:
    """A row a measurement under a head; columns that say nothing are left out."""
    head = (
        *("measured on", "context", "tokens", "model", "perplexity", "full precision"),
        *("KL, nats", "same first token", "logit error", "largest"),
    )
    rows = [head]
    for one in results[-MOST_SHOWN:]:
        begin = f" ({cell(one['begin'], 60)})" if one["begin"] else ""
        divergence = divergence_words(one["divergence"]) if one["divergence"] else ("", "", "", "")
        rows.append(
            (
                cell(one["corpus"], 60) + begin,
                str(one["sequence_length"]),
                format_count(one["tokens"]),
                stage_label(one["stage"]) if one["stage"] else "",
                "not finite" if one["perplexity"] is None else format_number(one["perplexity"]),
                "" if one["full_precision"] is None else format_number(one["full_precision"]),
                *divergence,
            )
        )
    kept = [index for index in range(len(head)) if any(row[index] for row in rows[1:])]
    return [tuple(row[index] for index in kept) for row in rows]


def results_table(results: Sequence[Tree]) -> str:
    """Measurements as text."""
    head, *rows = result_rows(results)
    return table(
        [(f"  {first}", *others) for first, *others in rows],
        header=(f"  {head[0]}", *head[1:]),
        right="l" + "r" * (len(head) - 1),
    )
