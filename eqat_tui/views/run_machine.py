"""What the machine says while a run works: memory, load and speed, or as they were at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.run import events
from engine.run.state import RunState
from eqat_tui.feed import RunView
from eqat_tui.lines import Line, bar, cut, line, width_of
from eqat_tui.output import format_bytes, format_count, format_number, share
from eqat_tui.planned import known
from eqat_tui.ranks_text import rank_lines

MOST_RATES = 8


def machine_lines(view: RunView, width: int) -> list[Line]:
    """Memory now, peak and planned; GPU load, temperature and power; disk; speed."""
    state = view.state
    reading, plan = state.memory, known(state.plan)
    lines = [
        *_gpu_lines(reading, plan, state, width),
        *rank_lines(reading.ranks if reading is not None else (), width),
        cut(_host_line(reading, plan, state), width),
        cut(_speed_line(state), width),
    ]
    if view.live or view.replay is not None:
        return lines
    return [[(text, "muted") for text, _ in spans] for spans in lines]  # of an engine that is gone


def _gpu_lines(
    reading: events.Memory | None, plan: Mapping[str, Any], state: RunState, width: int
) -> list[Line]:
    if reading is None or reading.gpu_used is None:
        if plan["device"] == "cuda" and reading is not None:
            return [line(("GPU   ", "strong"), ("no readings from the driver", "warn"))]
        unused = state.device and plan["device"] != "cuda"
        why = f"none used; {state.device}" if unused else "nothing measured yet"
        return [cut(line(("GPU   ", "strong"), (why, "muted")), width)]
    total = reading.gpu_total or 0
    words = line(("GPU   ", "strong"), f"{format_bytes(reading.gpu_used)} of {format_bytes(total)}")
    facts = [
        ("peak", _peak(state, "peak_gpu_bytes", reading, "gpu_peak")),
        ("plan", plan["peak_gpu_bytes"]),
        ("others", reading.gpu_other),
    ]
    for name, value in facts:
        if value is not None:
            over = name == "peak" and plan["peak_gpu_bytes"] and value > 1.05 * plan["peak_gpu_bytes"]
            words += line((f"  {name} ", "muted"), (format_bytes(value), "warn" if over else ""))
    load = line()
    for value, unit in (
        (reading.gpu_utilization, "%"),
        (reading.gpu_temperature, "°C"),
        (reading.gpu_power, "W"),
    ):
        if value is not None:
            load += line(f"{format_count(value)} {unit}  ")
    used = share(reading.gpu_used, total) if total else None
    room = width - width_of(words) - width_of(load) - 4
    if room >= 8:
        return [[*words, ("  ", ""), *bar(used, min(room, 30)), ("  ", ""), *load]]
    return [cut(words, width), cut(line("      ", *load), width)]


def _peak(state: RunState, name: str, reading: events.Memory, now: str) -> int | None:
    """Of the whole run, as the plan's is; a reading knows that of its phase, of each of several processes."""
    peaks = [getattr(one, now) for one in (reading, *reading.ranks)]
    peaks += [getattr(row, name) for row in state.phases]
    return max((peak for peak in peaks if peak is not None), default=None)


def _host_line(reading: events.Memory | None, plan: Mapping[str, Any], state: RunState) -> Line:
    spans = line(("host  ", "strong"))
    if reading is None or reading.host_used is None:
        return [*spans, ("nothing measured yet", "muted")]
    spans += line(format_bytes(reading.host_used))
    facts = [
        (
            "peak",
            _peak(state, "peak_host_bytes", reading, "host_peak"),
        ),
        ("plan", plan["peak_host_bytes"]),
        ("free", reading.host_available),
        ("disk free", reading.disk_free),
    ]
    for name, value in facts:
        if value is not None:
            spans += line((f"  {name} ", "muted"), format_bytes(value))
    return spans


def _speed_line(state: RunState) -> Line:
    metric = state.metrics[-1] if state.metrics else None
    spans = line(("train ", "strong"))
    if metric is None or metric.phase != state.phase:
        return [*spans, ("no training at the moment", "muted")]
    if metric.tokens_per_second:
        spans += line(f"{format_count(metric.tokens_per_second)} tokens/s")
    loss = "not finite" if metric.non_finite else format_number(metric.loss)
    spans += line(("  loss ", "muted"), (loss, "bad" if metric.non_finite else ""))
    for name, rate in list(metric.lr.items())[:MOST_RATES]:
        spans += line((f"  lr {name} ", "muted"), format_number(rate, 3))
    if metric.grad_norm is not None:
        spans += line(("  gradient ", "muted"), format_number(metric.grad_norm, 3))
    return spans
