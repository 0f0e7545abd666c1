"""Forward passes: seconds of what passes through a block, and whether compiling them pays."""

from __future__ import annotations

import math

from engine.config.stages import measured_stage
from engine.plan.costs import made_costs
from engine.plan.estimate import CONSTANTS, Workload
from engine.plan.rates import COMPILING_PAYS, Speed, forward_flops
from engine.plan.streams import shares_teacher, streamed, taught


def compiles_passages(work: Workload, rates: Speed) -> bool:
    """Whether blocks are compiled for forward passes alone: the two streams, a teacher's, perplexities.

    It has to save twice what compiling a training's steps does: there are five forms and more to compile.
    """
    runtime = work.config.runtime
    if not work.cuda or runtime.deterministic:
        return False
    if runtime.compile != "auto":
        return runtime.compile == "on"
    evaluations = sum(bool(measured_stage(phase)) for phase in work.phases())
    tokens = evaluations * work.windows * work.config.evaluation.sequence_length
    streams, teacher = streamed(work.config), taught(work.config)
    if streams is not None:
        tokens += made_costs(work.config)[0].streams() * streams.tokens
    if teacher is not None and not shares_teacher(work):
        tokens += teacher.tokens
    saved = rates.passage.per_number - rates.compiled_passage.per_number
    return work.arch.blocks * tokens * work.arch.hidden * saved >= 2 * COMPILING_PAYS


def compiling_form(work: Workload, rates: Speed) -> float:
    """Seconds that one form of a block or head takes to compile; 0 where passages are not compiled."""
    return CONSTANTS.gpu_compile_passage if compiles_passages(work, rates) else 0.0


def passing(work: Workload, rates: Speed, sequences: int, length: int, batch: int) -> float:
    """So many sequences forward through one block, ``batch`` at a time."""
    cost = rates.compiled_passage if compiles_passages(work, rates) else rates.passage
    tokens = sequences * length
    products = tokens * forward_flops(work.arch, length) / rates.flops
    return max(
        products + tokens * work.arch.hidden * cost.per_number, math.ceil(sequences / batch) * cost.launch
    )
