"""A sweep as one table: its plan, and what has become of its runs, as text, Markdown and CSV.

Everything is made from the dictionaries that ``--json`` prints.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

from engine.config.lists import value_words
from engine.config.stages import stage_label, versions
from engine.config.sweeps import settings_words
from engine.plan.several import Planned, SeveralPlans
from eqat_tui.output import (
    LONGEST_LINE,
    cell,
    counted,
    format_bits,
    format_bytes,
    format_number,
    format_seconds,
    key_values,
    one_line,
    table,
)
from eqat_tui.run_text import DISK_FULL, ago, batch_words

Tree = Mapping[str, Any]
LONGEST_VALUE = 40
"""Letters of a setting in a table for people."""


# -- the plan ------------------------------------------------------------------------------------------


def plan_text(settings: Sequence[Tree], plans: SeveralPlans) -> str:
    """What each run would need, what all together do, and what does not fit."""
    names = list(settings[0]) if settings else []
    gpu = any(run.plan is not None and run.plan.device == "cuda" for run in plans.runs)
    header = ["#", *names, "time", *(["GPU memory"] if gpu else []), "host memory", "disk", "size", "bits"]
    rows = [
        [str(number), *_values(names, one), *_needs(run, gpu)]
        for number, (one, run) in enumerate(zip(settings, plans.runs, strict=True), 1)
    ]
    parts = [table(rows, header=header, right="r" + "l" * len(names) + "r" * (len(header) - 1 - len(names)))]
    parts.append(key_values(_totals(plans)))
    notes = [
        one_line(f"does not fit: run {number} ({settings_words(one)}): {obstacle.error}")
        for number, (one, run) in enumerate(zip(settings, plans.runs, strict=True), 1)
        for obstacle in run.obstacles
    ]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _needs(run: Planned, gpu: bool) -> list[str]:
    plan = run.plan
    if plan is None:
        return ["–"] * (6 if gpu else 5)
    return [
        format_seconds(plan.seconds),
        *([format_bytes(plan.peak_gpu_bytes)] if gpu else []),
        format_bytes(plan.peak_host_bytes),
        format_bytes(plan.disk_bytes),
        format_bytes(plan.export_bytes),
        format_bits(plan.bits_per_weight),
    ]


def _totals(plans: SeveralPlans) -> dict[str, str]:
    fitting = len(plans.fitting)
    runs = counted(len(plans.runs), "run")
    of = runs if fitting == len(plans.runs) else f"{fitting} of {runs}"
    how = "one after the other" if plans.jobs == 1 else f"{plans.jobs} at a time"
    return {
        "time": f"about {format_seconds(plans.seconds)}, {of} {how}",
        "disk": f"{format_bytes(plans.disk_bytes)} of {format_bytes(plans.disk_free)} free at most; "
        f"{format_bytes(plans.kept_bytes)} stay",
    }


def totals_words(plans: SeveralPlans) -> str:
    """The same in a line."""
    return (
        f"about {format_seconds(plans.seconds)}, {format_bytes(plans.disk_bytes)} of "
        f"{format_bytes(plans.disk_free)} free on the disk"
    )


# -- several -------------------------------------------------------------------------------------------


def sweeps_text(rows: Sequence[Tree]) -> str:
    """A line a sweep: how far it is, what became of runs that are not done, and what it sweeps."""
    now = time.time()
    cells = [
        [
            cell(row["id"]),
            f"{row['done']} of {row['runs']}" + (", at work" if row["at_work"] else ""),
            ", ".join(f"{count} {state}" for state, count in row["states"].items() if state != "done") or "–",
            cell(", ".join(row["swept"])),
            ago(row["made"], now),
        ]
        for row in rows
    ]
    return table(cells, header=["SWEEP", "DONE", "OTHERS", "SWEPT", "MADE"])


# -- the result ----------------------------------------------------------------------------------------


def sweep_text(shown: Tree) -> str:
    """The table for people, under a line that says how far the sweep is; errors follow it."""
    rows, names, stages = shown["runs"], shown["swept"], _stages(shown)
    state = " · at work" if shown["at_work"] else ""
    head = f"{cell(shown['id'])} · {shown['done']} of {len(rows)} done{state}"
    right = "r" + "l" * len(names) + "r" * (len(stages) + 3 + len(_memories(shown)))
    parts = [head, table([_cells(row, shown) for row in rows], header=_header(shown), right=right)]
    errors = [f"{row['number']}: {error_text(row)}" for row in rows if row["error"]]
    return "\n\n".join([*parts, *(["\n".join(errors)] if errors else [])])


def sweep_markdown(shown: Tree) -> str:
    """A Markdown table, errors in a column of their own."""
    numbers = len(_stages(shown)) + 3 + len(_memories(shown))
    right = [True, *[False] * len(shown["swept"]), *[True] * numbers, False, False, False]
    lines = [[*_header(shown), "error"], ["--:" if one else ":--" for one in right]]
    lines += [[*_cells(row, shown), error_text(row)] for row in shown["runs"]]
    escaped = [[_markdown(one) for one in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def sweep_csv(shown: Tree) -> str:
    """Comma-separated values: numbers as they are, sizes in bytes, times in seconds."""
    names, stages = shown["swept"], _stages(shown)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    perplexities = [f"perplexity.{stage}" for stage in stages]
    writer.writerow(
        [
            *("number", *names, *perplexities, "bits_per_weight", "bytes", "seconds"),
            *("peak_gpu_bytes", "peak_host_bytes", "outcome", "id", "error"),
        ]
    )
    for row in shown["runs"]:
        numbers = [row["perplexity"].get(stage) for stage in stages]
        numbers += [row["bits_per_weight"], row["size_bytes"]["quantized"], row["seconds"]]
        numbers += [row["peak_gpu_bytes"], row["peak_host_bytes"]]
        values = [value_words(row["settings"].get(name)) for name in names]
        known = ["" if value is None else value for value in numbers]
        writer.writerow([row["number"], *values, *known, row["outcome"], row["id"] or "", error_text(row)])
    return text.getvalue().removesuffix("\n")


def error_text(row: Tree) -> str:
    """Why a run is not done, in one line; empty where nothing is known to be wrong."""
    error = row["error"]
    if not error:
        return ""
    where = f"{error['where']}: " if error["where"] else ""
    hint = f" ({error['hint']})" if error["hint"] else ""
    return one_line(f"{where}{error['message']}{hint}")


def _header(shown: Tree) -> list[str]:
    labels = [stage_label(stage) for stage in _stages(shown)]
    measured = ("bits", "size", "time", *_memories(shown).values())
    return ["#", *shown["swept"], *labels, *measured, "outcome", "run"]


def _memories(shown: Tree) -> dict[str, str]:
    """The kinds of memory that any of its runs has taken, and what their columns are called."""
    names = {"peak_gpu_bytes": "GPU", "peak_host_bytes": "memory"}
    return {one: word for one, word in names.items() if any(row[one] is not None for row in shown["runs"])}


def _stages(shown: Tree) -> list[str]:
    """The versions of the model that any of its runs has measured, in their order."""
    found = [row["perplexity"].items() for row in shown["runs"]]
    measured = {stage for row in found for stage, value in row if value is not None}
    return [stage for stage in versions(measured) if stage in measured]


def _cells(row: Tree, shown: Tree) -> list[str]:
    return [
        str(row["number"]),
        *_values(shown["swept"], row["settings"]),
        *(format_number(row["perplexity"].get(stage)) for stage in _stages(shown)),
        format_bits(row["bits_per_weight"]),
        format_bytes(row["size_bytes"]["quantized"]),
        format_seconds(row["seconds"]),
        *(format_bytes(row[name]) for name in _memories(shown)),
        _outcome(row),
        str(row["id"] or "–"),
    ]


def _outcome(row: Tree) -> str:
    """What has become of a run, or where it is."""
    if row["outcome"] == "waiting" and row["batch"]:
        return f"waiting {batch_words(row['batch'])}"
    if row["waiting"]:
        return DISK_FULL
    return str(row["outcome"]) + (f" on {cell(row['node'])}" if row["node"] else "")


def _values(names: Sequence[str], settings: Tree) -> list[str]:
    return [cell(value_words(settings.get(name)), LONGEST_VALUE) for name in names]


def _markdown(text: str) -> str:
    """What of a text would begin something in Markdown, or end the cell, as it stands."""
    line = cell(text, LONGEST_LINE)
    return "".join(f"\\{letter}" if letter in "\\|`*_<>[]" else letter for letter in line)
