"""What the charts of a report draw of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from engine.config.stages import full_precision, phase_label, stage_label, versions
from engine.run import events
from engine.run.comparison import Compared
from engine.run.state import RunState
from eqat_tui.charts import Series
from eqat_tui.output import cell, format_bytes, format_number, number
from eqat_tui.report.svg import Chart, Mark, lines, marks
from eqat_tui.views.comparison import overlaid
from eqat_tui.views.run_charts import error_series, memory_series, profile_series

MOST_SHARES = 12
"""Tasks that are drawn; the table has all."""
MOST_NAME = 40
MOST_PHASES = 12
"""That trained; no run has as many, and a damaged log may name any."""


def charts_of(state: RunState) -> list[Chart]:
    """The charts of one run, those that there is something to draw for."""
    made = [
        perplexities(state),
        _tasks(state),
        _sizes(state),
        lines("Loss of each block", profile_series(state), x_name="block", log=True),
        lines(
            "Error behind each block, of full precision's hidden states",
            error_series(state),
            x_name="block",
            log=True,
        ),
        *training(state.metrics),
        _memory(state),
    ]
    return [one for one in made if one is not None]


def charts_across(runs: Sequence[Compared]) -> list[Chart]:
    """The charts of several runs together."""
    found = [run.state.perplexity() for run in runs]
    rows = [
        Mark(f"{run.letter}, {stage_label(stage)}", value, format_number(value), index)
        for stage in versions(name for one in found for name in one)
        for index, (run, one) in enumerate(zip(runs, found, strict=True))
        if (value := one.get(stage)) is not None
    ]
    made = [
        marks("Perplexity (logarithmic)", rows, log=True),
        lines("Final loss of each block", overlaid(runs), x_name="block", log=True),
    ]
    return [one for one in made if one is not None]


def perplexities(state: RunState) -> Chart | None:
    """Perplexity of every version of the model; rounding alone may be thousands of times the others."""
    rows = [
        Mark(stage_label(stage), value, format_number(value), 1 if stage == full_precision() else 0)
        for stage, value in state.perplexity().items()
    ]
    return marks("Perplexity (logarithmic)", rows, log=True)


def _tasks(state: RunState) -> Chart | None:
    """Shares of right answers of every version of the model."""
    shares: dict[str, dict[str, float]] = {}
    for stage, found in state.accuracy().items():
        for task, value in found.items():
            shares.setdefault(cell(task, MOST_NAME), {})[stage] = value
    for stage, scores in state.scores().items():
        for one in scores:
            if one.value is not None and one.better == "larger" and 0 <= one.value <= 1:
                shares.setdefault(cell(one.name, MOST_NAME), {})[stage] = one.value
    rows = [
        Mark(task, 100 * value, f"{100 * value:.1f} {stage_label(stage)}", index)
        for task, values in list(shares.items())[:MOST_SHARES]
        for index, (stage, value) in enumerate(values.items())
    ]
    return marks("Tasks, %", rows)


class _Curve(NamedTuple):
    phase: str
    by_block: bool


def training(metrics: Sequence[events.Metric]) -> list[Chart | None]:
    """A chart of the training loss of each phase; of one that goes from block to block, one block after the
    other, each with a line of its own."""
    curves = dict.fromkeys(_Curve(one.phase, one.block is not None) for one in metrics)
    return [_training(curve, metrics) for curve in list(curves)[:MOST_PHASES]]


def _training(curve: _Curve, metrics: Sequence[events.Metric]) -> Chart | None:
    trained: list[tuple[float, float | None]] = []
    checked: list[tuple[float, float | None]] = []
    before: int | None = None
    for one in metrics:
        if one.phase != curve.phase or (one.block is not None) != curve.by_block:
            continue
        x = number(one.step) or 0.0
        if one.block is not None:
            x = (number(one.block) or 0.0) + min(1.0, x / max(1.0, number(one.steps) or 1.0))
            if one.block != before:
                trained.append((x, None))
                checked.append((x, None))
            before = one.block
        trained.append((x, one.loss if one.loss is not None else math.nan if one.non_finite else None))
        if one.val_loss is not None:
            checked.append((x, one.val_loss))
    series = [Series("training", trained, "series1"), Series("validation", checked, "series2")]
    x_name = "block, and part of its steps" if curve.by_block else "step"
    return lines(f"Training loss of {phase_label(curve.phase)}", series, x_name=x_name, log=True)


def _memory(state: RunState) -> Chart | None:
    series = memory_series(state)
    longest = max((abs(x) for one in series for x, _ in one.points), default=0.0)
    unit, size = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 180 else ("seconds", 1)
    scaled = [Series(one.name, [(x / size, y) for x, y in one.points], one.role) for one in series]
    return lines("Memory, GiB", scaled, x_name=f"{unit} since the first reading", from_zero=True)


def _sizes(state: RunState) -> Chart | None:
    """The original and every export."""
    exports = list(state.exports.values())
    rows = (
        [Mark("original", float(number(exports[0].fp_bytes) or 0), format_bytes(exports[0].fp_bytes), 1)]
        if exports
        else []
    )
    rows += [Mark(one.format, number(one.bytes), format_bytes(one.bytes)) for one in exports]
    return marks("Size of the weights", rows)
