"""The time model: operations and memory traffic of each phase over the rates of the device.

These are estimates, meant to tell minutes from hours from days; the engine's own progress replaces them
after the first block. What a stage takes is said in its file (:mod:`engine.plan.stages`); what the other
phases take, in ``phases.py``.
"""

from __future__ import annotations

from engine.config.stages import STAGES, measured_stage
from engine.plan.costs import costs_of
from engine.plan.estimate import CONSTANTS, Workload
from engine.plan.own_text import writing_seconds
from engine.plan.phases import evaluation_seconds, export_seconds
from engine.plan.rates import Speed, head_seconds


def phase_seconds(work: Workload, phase: str, rates: Speed, stored_bytes: int) -> float:
    """Estimated duration of one phase."""
    if phase == "prepare":
        return CONSTANTS.prepare + head_seconds(work, rates) + writing_seconds(work, rates, stored_bytes)
    if phase == "export":
        return export_seconds(work, rates, stored_bytes)
    if measured_stage(phase):
        return evaluation_seconds(work, STAGES[measured_stage(phase)], rates, stored_bytes)
    return costs_of(STAGES[phase]).seconds(work, rates, stored_bytes)
