"""What conversations cost beside a text of as many windows: masks that keep packed ones apart, and a second
measurement."""

from __future__ import annotations

from engine.config.stages import Stage, answer_length, learns_answers
from engine.plan.estimate import Workload
from engine.plan.passages import passing
from engine.plan.rates import Speed, load_seconds

KEPT_MASKS = 4
"""Batches whose masks are kept, a byte a pair of tokens."""


def mask_memory(work: Workload, stage: Stage, batch: int, length: int) -> dict[str, int]:
    """Masks of a training's batches, which all differ: those that are kept (one each for full and sliding
    attention), and one as numbers, as attention adds it to its scores. A text needs none."""
    config = work.config
    if not (learns_answers(config, stage) and config.instructions.packing):
        return {}
    compute = work.bytes_of(getattr(config, stage.name).compute_dtype)
    return {"masks of packed conversations": batch * length * length * (2 * KEPT_MASKS + compute)}


def held_out_bytes(work: Workload) -> int:
    """Hidden states of the conversations whose answers are measured."""
    tokens = work.config.instructions.evaluation_sequences * answer_length(work.config)
    return tokens * work.arch.hidden * work.model_bytes


def answer_seconds(work: Workload, rates: Speed, stored_bytes: int) -> float:
    """Of measuring them, for which all blocks are read once more."""
    length, sequences = answer_length(work.config), work.config.instructions.evaluation_sequences
    if not length or not sequences:
        return 0.0
    arch = work.arch
    head = sequences * length * 2 * arch.vocab * arch.hidden / rates.flops
    passed = arch.blocks * passing(work, rates, sequences, length, 1)
    return head + passed + load_seconds(arch, stored_bytes)
