"""What ``eqat bench`` found, in words: also in the report of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config.loaders import LOADERS, Loader
from eqat_tui.output import cell, format_bytes, format_number, one_line, table

MEASURED, MISSING, FAILED = "measured", "missing", "failed"
"""What became of a loader."""


def bench_text(found: Mapping[str, Any]) -> str:
    """For a person: what was measured, then what was not and why."""
    rows = found["rows"]
    parts = [measured_table([row for row in rows if row["status"] == MEASURED])]
    others = []
    for row in rows:
        if row["status"] != MEASURED:
            hint = f" ({row['hint']})" if row["hint"] else ""
            others.append(one_line(f"{row['label']}, {row['format']}: {row['problem']}{hint}"))
    others += [
        f"{name}: no loader of this command computes with it as it is packed" for name in found["unread"]
    ]
    parts.append("\n".join(f"  {line}" for line in others))
    return "\n\n".join(filter(None, parts))


def measured_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Measurements, as the JSON has them; how much faster each is than the first where that is 16 bits on the
    same device."""
    if not rows:
        return ""
    lines = [_cells(row, _base(rows)) for row in rows]
    counts = {(row["prompt_tokens"], row["new_tokens"], row["threads"]) for row in rows}
    header = ("  loader", "format", "device", "prompt/s", "", "new/s", "", "model", "peak", "same tokens")
    text = [table(lines, header=header, right="lllrrrrrrr")]
    if len(counts) == 1:
        ((prompt, new, threads),) = counts
        each = "thread" if threads == 1 else "threads"
        text.append(
            f"  a prompt of {prompt} tokens and {new} new ones; on a processor {threads} {each}, where the "
            "loader takes a number"
        )
    return "\n".join(text)


def _base(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((row for row in rows if not _packs(row["loader"])), None)


def _packs(name: str) -> bool:
    loader: Loader | None = LOADERS.get(name)
    return loader is None or bool(loader.formats)


def _cells(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> tuple[str, ...]:
    comparable = base is not None and base is not row and base["device"] == row["device"]

    def times(name: str) -> str:
        return f"{format_number(row[name] / base[name], 2)}×" if comparable and base is not None else ""

    loader = LOADERS.get(row["loader"])
    same = row["agreement"]
    return (
        f"  {cell(row['loader'] if loader is None else loader.label, 40)}",
        cell(row["format"], 40),
        cell(row["device"], 40),
        format_number(row["prefill"], 3),
        times("prefill"),
        format_number(row["decode"], 3),
        times("decode"),
        format_bytes(row["model_bytes"]),
        format_bytes(row["peak_bytes"]),
        "" if same is None else f"{100 * same:.0f} %",
    )
