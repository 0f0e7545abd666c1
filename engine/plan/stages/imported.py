"""Importing blocks: those of a quantized checkpoint are read, unpacked once and packed as ours.

It trains nothing, and holds one block at a time as bytes.
"""

from __future__ import annotations

from engine.plan.costs import StageCosts
from engine.plan.estimate import Workload
from engine.plan.memory_terms import Memory, largest_linear
from engine.plan.rates import Speed, load_seconds

UNPACKED_BYTES = 16
"""Of a weight of the largest linear: as bits one a byte, as an integer, and as words of 64 bits in parts."""
UNPACKING_RATE = 5e7
"""Weights a second that are unpacked, and packed again."""


class ImportCosts(StageCosts):
    """Of ``imported``; the rest is what is taken for granted of every stage."""

    def memory(self, work: Workload) -> Memory:
        arch = work.arch
        parts = {"one block": arch.params_per_block, "unpacking": UNPACKED_BYTES * largest_linear(arch)}
        return Memory({}, aside=sum(parts.values())) if work.cuda else Memory(parts)

    def seconds(self, work: Workload, rates: Speed, stored_bytes: int) -> float:
        weights = work.arch.blocks * work.arch.linear_params_per_block
        return load_seconds(work.arch, stored_bytes) + weights / UNPACKING_RATE
