"""Rounding to nearest: a block in float32, and the search for its ranges.

It goes over the weights once and trains nothing. Where it is only measured, its blocks are made for that and
dropped again.
"""

from __future__ import annotations

from engine.plan.costs import StageCosts
from engine.plan.estimate import Workload
from engine.plan.memory_terms import rounding


class RoundingCosts(StageCosts):
    """Of ``rtn``; the rest is what is taken for granted of every stage."""

    def while_measured(self, work: Workload) -> dict[str, int]:
        return rounding(work)
