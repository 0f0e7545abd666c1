"""The processes of a run on several GPUs: what each holds and does, which is the slowest, whose peak was the
largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.run.events import RankReading
from eqat_tui.lines import Line, cut, line
from eqat_tui.output import format_bytes, format_count, format_number

MOST_RANKS = 64
CLEARLY = 0.8
"""Of the second least wait: whoever waits less than that is called the slowest."""


def slowest(ranks: Sequence[RankReading]) -> int | None:
    """Who the others wait for: the one that clearly waits least itself; none where nobody does, or where not
    all have been heard of."""
    waits = sorted((one.waited, one.rank) for one in ranks if one.waited is not None)
    if len(waits) < 2 or len(waits) < len(ranks) or waits[0][0] >= CLEARLY * waits[1][0]:
        return None
    return waits[0][1]


def rank_lines(ranks: Sequence[RankReading], width: int) -> list[Line]:
    """A line for each process: memory, its peak, load, how long it waited."""
    last = slowest(ranks)
    return [cut(_rank_line(one, one.rank == last), width) for one in ranks[:MOST_RANKS]]


def _rank_line(one: RankReading, is_slowest: bool) -> Line:
    spans = line(f"  rank {one.rank}  ")
    if one.gpu_used is not None:
        spans += line(f"{format_bytes(one.gpu_used)} of {format_bytes(one.gpu_total)}")
        peak = one.gpu_peak
    else:
        spans += line(format_bytes(one.host_used))
        peak = one.host_peak
    if peak is not None:
        spans += line(("  peak ", "muted"), format_bytes(peak))
    loads = ((one.gpu_utilization, "%"), (one.gpu_temperature, "°C"), (one.gpu_power, "W"))
    for value, unit in loads:
        if value is not None:
            spans += line(f"  {format_count(value)} {unit}")
    if one.waited is not None:
        spans += line(("  waited ", "muted"), f"{format_number(1e3 * one.waited, 3)} ms")
    return [*spans, ("  the slowest", "warn")] if is_slowest else spans


def peaks(phases: Sequence[Mapping[str, Any]], name: str) -> dict[int, int]:
    """Of every process of a run, the largest ``name`` (``peak_gpu_bytes``) of all its phases; empty for a run
    of one."""
    found: dict[int, int] = {}
    for phase in phases:
        for one in phase.get("ranks") or ():
            if one[name] is not None:
                found[one["rank"]] = max(found.get(one["rank"], 0), one[name])
    return dict(sorted(found.items())[:MOST_RANKS])


def whose(of_ranks: Mapping[int, int]) -> str:
    """Which process has the largest peak, and the others' peaks; empty for a run of one."""
    if len(of_ranks) < 2:
        return ""
    largest = max(of_ranks, key=lambda rank: of_ranks[rank])
    others = ", ".join(f"{rank}: {format_bytes(peak)}" for rank, peak in of_ranks.items() if rank != largest)
    return f"rank {largest}; rank {others}"
