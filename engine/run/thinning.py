"""How much of a long log a state keeps: metrics and readings of the machine, the older the fewer.

Nineteen events in twenty are one of the two. With each round of thinning the past gets coarser; the present
stays.
"""

from __future__ import annotations

from typing import Any, Protocol

from engine.run import events
from engine.run.events import Event

MAX_METRICS = 2000
MAX_READINGS = 600


class _Kept(Protocol):
    """What a state has of them."""

    @property
    def metrics(self) -> tuple[events.Metric, ...]: ...
    @property
    def readings(self) -> tuple[events.Memory, ...]: ...
    @property
    def event_count(self) -> int: ...
    @property
    def first_t(self) -> float | None: ...


def appended(kept: list[Any], new: Any, most: int) -> list[Any]:
    """``kept`` with ``new``, at most ``most``: when there are more, every second of the older half goes."""
    kept.append(new)
    if len(kept) > most:
        half = len(kept) // 2
        kept = kept[:half:2] + kept[half:]
    return kept


def before(metrics: list[events.Metric], event: events.Metric) -> list[events.Metric]:
    """``metrics`` without those that a resumed attempt, going on from an earlier step, does again.

    It may go back by more than a block (to the generation before a damaged one), so this is looked for at
    the first metric of every block, and only there.
    """
    last = metrics[-1] if metrics else event
    if (last.attempt, last.phase, last.block) == (event.attempt, event.phase, event.block):
        return metrics
    # A damaged log may change the block at every metric, so this has to be quick.
    phase, block, step = event.phase, event.block, event.step
    return [old for old in metrics if old.block != block or old.phase != phase or old.step < step]


class Bulk:
    """Metrics and readings of one attempt, in lists of their own, on their way into a state."""

    def __init__(self) -> None:
        self._metrics: list[events.Metric] = []
        self._readings: list[events.Memory] = []
        self._seen: list[Event] = []
        self._latest: dict[type[Event], Any] = {}
        self._count = 0

    def take(self, state: _Kept, event: events.Metric | events.Memory) -> None:
        """Add ``event`` to what came since ``state``."""
        if not self._seen:
            self._seen = [event]
            self._metrics, self._readings = list(state.metrics), list(state.readings)
        if isinstance(event, events.Metric):
            self._metrics = appended(before(self._metrics, event), event, MAX_METRICS)
        else:
            self._readings = appended(self._readings, event, MAX_READINGS)
        self._latest[type(event)] = event
        self._seen[1:] = [event]
        self._count += 1

    def changes(self, state: _Kept) -> dict[str, Any]:
        """What becomes of ``state`` by all of them."""
        if not self._seen:
            return {}
        metric, memory = self._latest.get(events.Metric), self._latest.get(events.Memory)
        changes: dict[str, Any] = {
            "event_count": state.event_count + self._count,
            "first_t": self._seen[0].t if state.first_t is None else state.first_t,
            "last_t": self._seen[-1].t,
            "last_mono": self._seen[-1].mono,
        }
        if metric is not None:
            changes["metrics"] = tuple(self._metrics)
            changes |= {name: getattr(metric, name) for name in ("block", "step", "steps", "epoch")}
        if memory is not None:
            changes |= {"memory": memory, "readings": tuple(self._readings)}
        return changes
