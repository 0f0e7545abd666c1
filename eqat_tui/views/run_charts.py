"""What the monitor's charts draw of a run: losses over steps, losses over blocks, memory over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from engine.config.stages import phase_label, stage_label
from engine.run import events
from engine.run.state import MAX_BLOCKS, RunState
from eqat_tui.charts import Series
from eqat_tui.feed import RunView
from eqat_tui.output import number
from eqat_tui.planned import known

ChartKind = Literal["loss", "profile", "memory"]
CHARTS: tuple[ChartKind, ...] = ("loss", "profile", "memory")


def drawn(view: RunView, kind: ChartKind, chosen: int | None) -> tuple[str, Sequence[Series], str]:
    """Title, series, and name of the x axis."""
    if kind == "profile":
        return "loss per block", profile_series(view.state), "block"
    if kind == "memory":
        return "memory, GiB", memory_series(view.state), "seconds"
    name, series = loss_series(view, chosen)
    return name, series, "step"


def x_range(view: RunView, kind: ChartKind, chosen: int | None) -> tuple[float, float] | None:
    """The x axis: all steps and all blocks, those to come included, so that progress shows."""
    if kind == "profile":
        blocks = known(view.state.plan)["blocks"] or view.state.blocks
        return (0, min(blocks, MAX_BLOCKS) - 1) if blocks and blocks > 1 else None
    if kind == "loss":
        place = shown_block(view, chosen)
        steps = [m.steps for m in view.state.metrics if (m.phase, m.block) == place]
        return (1, steps[-1]) if steps and steps[-1] > 1 else None
    return None


def shown_block(view: RunView, chosen: int | None) -> tuple[str | None, int | None]:
    """The phase and block whose loss is drawn: the chosen block, else where training is or last was."""
    state = view.state
    if chosen is not None:
        row = next((row for row in state.trained_blocks() if row.index == chosen), None)
        if row is not None:
            return row.phase, row.index
    last = state.metrics[-1] if state.metrics else None
    return (last.phase, last.block) if last is not None else (None, None)


def loss_series(view: RunView, chosen: int | None) -> tuple[str, list[Series]]:
    """What is drawn and its title: training loss, and validation where there is one."""
    phase, block = shown_block(view, chosen)
    if phase is None:
        return "loss", [Series("loss", [])]
    own = [metric for metric in view.state.metrics if metric.phase == phase and metric.block == block]
    name = phase_label(phase) if block is None else f"block {block}"
    series = [Series("train", [(m.step, _value(m)) for m in own], "series1")]
    checked = [(float(m.step), m.val_loss) for m in own if m.val_loss is not None]
    if checked:
        series.append(Series("valid.", checked, "series2"))
    return f"loss of {name}", series


def _value(metric: events.Metric) -> float | None:
    """The loss; a number that was not finite is NaN again, so that the chart can show it."""
    return metric.loss if metric.loss is not None else math.nan if metric.non_finite else None


def profile_series(state: RunState) -> list[Series]:
    """Reconstruction loss per block: before training, after it, and on validation text."""
    rows = state.trained_blocks()
    made = [
        Series("initial", [(row.index, row.initial_loss) for row in rows if row.finished], "series2"),
        Series("final", [(row.index, row.final_loss) for row in rows if row.finished], "series1"),
    ]
    if any(row.val_loss is not None for row in rows):
        made.append(Series("valid.", [(row.index, row.val_loss) for row in rows if row.finished], "series3"))
    return made


def error_series(state: RunState) -> list[Series]:
    """Relative error of the hidden states behind each block, a line a quantized version."""
    return [
        Series(stage_label(stage), list(enumerate(errors)), f"series{index % 4 + 1}")
        for index, (stage, errors) in enumerate(state.block_errors().items())
    ]


def memory_series(state: RunState) -> list[Series]:
    """Memory over the run, GiB: of the GPU where there is one, else of the process."""
    first = state.readings[0].t if state.readings else 0.0
    plan = known(state.plan)
    for name, used, planned, role in (
        ("GPU", "gpu_used", "peak_gpu_bytes", "series1"),
        ("process", "host_used", "peak_host_bytes", "series3"),
    ):
        points = [(round(number(r.t - first) or 0.0), number(getattr(r, used))) for r in state.readings]
        measured = [(t, value / 2**30) for t, value in points if value is not None]
        if measured:
            made = [Series(name, measured, role)]
            if plan[planned]:
                made.append(Series("plan", [(t, plan[planned] / 2**30) for t, _ in measured], "series2"))
            return made
    return [Series("process", [], "series3")]
