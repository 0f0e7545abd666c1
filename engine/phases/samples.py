"""The phase ``generate``: the full-precision and the quantized model continue the same prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext

import msgspec
import torch
from torch import Tensor, nn

from engine import telemetry
from engine.config.stages import full_precision
from engine.errors import UsageError
from engine.evaluation.continuation import continuation, prompt_ids
from engine.evaluation.room import free_for_blocks
from engine.models.skeleton import text_config
from engine.phases.imported import original
from engine.phases.job import Job
from engine.run import events
from engine.run.task import NEW_TOKENS

FIRST_TOKEN_SILENCE = 600
"""Seconds that reading a long prompt may take unheard."""


def write_samples(
    job: Job, prompt: str, new_tokens: int = NEW_TOKENS, *, budget_bytes: int | None = None
) -> None:
    """Emit a :class:`~engine.run.events.Sample` for each of the two models; nothing is checkpointed.

    One that has no room as a whole, in ``budget_bytes`` or what is free, gets a problem in place of a text.

    Raises:
        UsageError: for a prompt longer than the model can read.
    """
    ids_1T = prompt_ids(job.encoder, prompt)
    new_tokens = _room_after(job, ids_1T.shape[1], new_tokens)
    # Two models one after the other, each with all of its blocks.
    models: list[tuple[str, Job, Callable[[int], nn.Module]]] = [
        (job.newest_stage().name, job, job.dense_block)
    ]
    if not job.config.imported.lacks_original:
        full = original(job)
        models.insert(0, (full_precision(), full, full.lm.load_block))
    count = _Count(job, len(models), new_tokens)
    for position, (stage, of, block_for) in enumerate(models):
        count.at(position, 0)
        problem = _too_large(job, budget_bytes)
        sample = events.Sample(stage=stage, prompt=prompt, problem=problem)
        if not problem:
            load = _told(job, block_for, position, count)
            with nullcontext() if stage == full_precision() else job.outer_as_exported():
                sample = _written(of, sample, load, ids_1T, new_tokens, position, count)
        job.report.emit(sample)
        telemetry.release_memory()


def _room_after(job: Job, tokens: int, wanted: int) -> int:
    """How many of the ``wanted`` tokens have a place after so many: a model knows only so many positions."""
    table = job.lm.position_table
    made_for = getattr(text_config(job.lm.model.config), "max_position_embeddings", None)
    longest = made_for if table is None else table.rows
    if longest is None:
        return wanted
    if tokens >= longest:
        raise UsageError(
            f"has {tokens} tokens, and the model reads at most {longest}",
            where="--prompt",
            hint="give it a shorter one",
        )
    return min(wanted, int(longest) - tokens)


class _Count:
    """How far the phase is: of each model its blocks are read, then the tokens written."""

    def __init__(self, job: Job, models: int, new_tokens: int) -> None:
        self.report, self.each, self.models = job.report, job.blocks + new_tokens, models

    def at(self, model: int, done: int) -> None:
        self.report.step(model * self.each + min(done, self.each), self.models * self.each)


def _told(
    job: Job, block_for: Callable[[int], nn.Module], position: int, count: _Count
) -> Callable[[int], nn.Module]:
    """``block_for``, saying how far it is; a stop is heard between two blocks."""

    def load(index: int) -> nn.Module:
        count.at(position, index)
        block = block_for(index)
        if index == job.blocks - 1:
            job.report.expect_silence(FIRST_TOKEN_SILENCE)
        return block

    return load


def _written(
    job: Job,
    sample: events.Sample,
    load: Callable[[int], nn.Module],
    ids_1T: Tensor,
    new_tokens: int,
    position: int,
    count: _Count,
) -> events.Sample:
    """``sample`` with its text. A stop is heard after the next token, and half a text is not handed out."""
    tokens = itertools.count(job.blocks)

    def should_stop() -> bool:
        stop = job.report.stop_asked() is not None
        if not stop:
            count.at(position, next(tokens))
        return stop

    try:
        made = continuation(job.lm, load, ids_1T, new_tokens, should_stop=should_stop)
    except (torch.OutOfMemoryError, MemoryError):
        return msgspec.structs.replace(sample, problem="memory ran out with the whole model in it")
    job.report.leave_if_asked()
    return msgspec.structs.replace(sample, text=made.text, tokens=made.tokens, seconds=made.seconds)


def _too_large(job: Job, budget_bytes: int | None) -> str:
    """Why not all blocks can be in memory at once; empty when they can."""
    needed = job.lm.blocks_bytes()
    if budget_bytes is None:
        free, place = free_for_blocks(job.config, job.device, job.plan.machine)
    else:
        free, place = budget_bytes, "the budget"
    if needed <= free:
        return ""
    room = f"{place} has room for {max(0, free) / 2**30:.2f}"
    return f"all blocks together take {needed / 2**30:.2f} GiB, and {room}"
