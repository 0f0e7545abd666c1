"""How long an attempt still takes: the one place where that is estimated.

Until a phase has shown its own pace, the plan's seconds count for it, times how far off the plan was so far.
Then its own pace counts, and of that the recent one: what else works on the same cores or the same GPU now
decides, not what did an hour ago. A phase in which nothing can be counted has only the plan's seconds, and
says so once it has outlasted them, instead of standing at zero.

Seconds come from a monotonic clock that the caller reads; nothing here waits or looks at anything.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

from engine.run.status import PLAN_COUNTS

ENOUGH = 0.05
"""Part of a phase after which its own pace is believed: the first steps are slow, and a hundred times a wrong
number is a very wrong one."""
RECENT_S = 120.0
"""The pace is that of the last two minutes, or of a quarter of the phase where that is longer."""
MARKS = 512
"""So many moments of a phase are remembered, the older the fewer."""


class Estimate(msgspec.Struct, frozen=True):
    """What can be said of the time left."""

    seconds: float | None
    """All that is left; none where there is nothing to go by."""
    measured: bool = False
    """Whether that rests on this phase's own pace, and not only on the plan."""
    over: float | None = None
    """Seconds by which the phase has outlasted its plan, where nothing in it can be counted."""


class TimeLeft:
    """The phases of an attempt, what each was planned to take, and how far the present one is."""

    def __init__(self, phases: Sequence[str] = (), planned: Mapping[str, float] | None = None) -> None:
        self._phases, self._planned = tuple(phases), dict(planned or {})
        self._taken: dict[str, float] = {}
        self._phase = ""
        self._began = 0.0
        self._base = 0.0
        self._marks: deque[tuple[float, float]] = deque()

    def phase_begins(self, name: str, now: float) -> None:
        """The phase ``name`` begins."""
        self._phase, self._began, self._base = name, now, 0.0
        self._marks = deque([(now, 0.0)])

    def phase_ends(self, now: float) -> None:
        """The present phase ends."""
        self._taken[self._phase] = now - self._began
        self._phase, self._marks = "", deque()

    def restored(self, fraction: float, now: float) -> None:
        """So much of the phase was there already: what an earlier attempt did says nothing of its pace."""
        self._base = fraction
        self._marks = deque([(now, fraction)])

    def paused(self, seconds: float) -> None:
        """So long, until now, nothing was done: that is part of no phase and of no pace."""
        self._began += seconds
        self._marks = deque((t + seconds, fraction) for t, fraction in self._marks)

    def at(self, fraction: float, now: float) -> None:
        """So much of the phase is done."""
        marks = self._marks
        if marks and fraction > marks[-1][1]:
            marks.append((now, fraction))
            if len(marks) > MARKS:
                half = [*marks][: MARKS // 2 : 2]
                self._marks = deque([*half, *[*marks][MARKS // 2 :]])

    def estimate(self, now: float) -> Estimate:
        """What is left now."""
        if not self._phase:
            return Estimate(None)
        planned = self._planned.get(self._phase, 0.0)
        recent = self._recent(now)
        if recent is None:
            pace = self._pace(0.0, 0.0)
            rest = pace * planned * (1 - self._base) - (now - self._began)
            if not any(self._planned.values()):
                return Estimate(None)
            return Estimate(max(0.0, rest) + pace * self._later(), over=-rest if rest < 0 else None)
        rate, since_last, usual = recent
        done = self._marks[-1][1]
        # Of the next count the time that it usually takes has gone by in part.
        rest = (1 - done) / rate - min(since_last, usual)
        over = since_last - usual if done >= 1 and since_last > usual else None
        pace = self._pace(planned * (done - self._base), (done - self._base) / rate)
        return Estimate(max(0.0, rest) + pace * self._later(), measured=True, over=over)

    def _recent(self, now: float) -> tuple[float, float, float] | None:
        """Parts of the phase a second, of late; seconds since the last count, and what one took before that.
        None while too little of the phase is done."""
        marks = self._marks
        if len(marks) < 2 or marks[-1][1] - self._base < ENOUGH * (1 - self._base):
            return None
        (before, _), (last, done) = marks[-2], marks[-1]
        since_last, usual = now - last, last - before
        begin = now - max(RECENT_S, (now - marks[0][0]) / 4)
        earlier = [mark for mark in marks if mark[0] < last]
        first, had = next((mark for mark in reversed(earlier) if mark[0] <= begin), marks[0])
        # What takes longer than the last count did has slowed down, and that is known before it is counted.
        spent = last - first + max(0.0, since_last - usual)
        return ((done - had) / spent, since_last, usual) if spent > 0 else None

    def _pace(self, planned: float, taken: float) -> float:
        """How many times as long as planned everything takes: the phases that are over, and what is done of
        the present one at its recent rate. While that is short, the plan is believed."""
        prior = PLAN_COUNTS * sum(self._planned.values())
        taken += prior + sum(self._taken.values())
        planned += prior + sum(self._planned.get(name, 0.0) for name in self._taken)
        pace = taken / planned if planned > 0 else 1.0
        return pace if math.isfinite(pace) else 1.0  # a plan of next to no time says nothing

    def _later(self) -> float:
        """Planned seconds of the phases to come."""
        if self._phase not in self._phases:
            return 0.0
        position = self._phases.index(self._phase)
        return sum(self._planned.get(name, 0.0) for name in self._phases[position + 1 :])
