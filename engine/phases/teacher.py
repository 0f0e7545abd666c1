"""The teacher of a stage of the whole network: the full-precision model's last hidden states on its text.

Block-AP's full-precision stream ends as just that where its text contains the stage's and its arithmetic is
the same: :mod:`engine.plan.streams` says whether the configuration allows it, then the tokens decide.
Otherwise, and in a run that was resumed behind Block-AP, the text goes through the original blocks once more,
unless the plan had it stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.stages import Stage
from engine.data.activations import ActivationStore
from engine.methods.network.teacher import Teacher, positions
from engine.phases.imported import original
from engine.phases.job import Job, compute_dtype
from engine.phases.passage import pass_through, store_at, stored_at
from engine.plan.streams import may_share_teacher, streamed_stage, taught, taught_stage


@dataclass(frozen=True)
class _Text:
    name: str
    tokens: Tensor
    rows: Tensor | None
    """Where the stage's own sequences lie in ``tokens``; none when they are the same."""
    positions: Tensor | None = None
    """Of packed samples."""


def is_taught(job: Job, stage: Stage) -> bool:
    """Whether a stage learns from a teacher."""
    return taught_stage(job.config) == stage


def _text(job: Job, stage: Stage) -> _Text:
    """The text whose last hidden states teach ``stage``.

    A resumed run computes Block-AP's stream anew from the same text in the same batches: in other batches,
    the last bits would be others.
    """
    windows = job.tokens.of(stage.name)
    own, answers = windows.tokens_NT, windows.answers
    alone = _Text("teacher", own, None, None if answers is None else answers.positions_NT)
    if answers is not None or not may_share_teacher(job.config, cuda=job.device.type == "cuda"):
        return alone
    streamed = job.tokens.of(streamed_stage(job.config).name).tokens_NT
    rows = positions(own, streamed)
    ranks = job.world.size
    if rows is None or (ranks > 1 and bool((rows % ranks != torch.arange(len(rows)) % ranks).any())):
        return alone  # also where a rank's share of the one is not its share of the other
    return _Text("full", streamed, rows)


def _dtype(job: Job) -> torch.dtype:
    text = taught(job.config)
    assert text is not None, "nothing learns from a teacher"
    return compute_dtype(text.compute_dtype, job.device)


def keep_as_teacher(job: Job, full: ActivationStore) -> bool:
    """Whether Block-AP's full-precision stream, behind the last block, is the teacher; stores it then, where
    the plan stores streams."""
    stage = taught_stage(job.config)
    if stage is None or _text(job, stage).name != "full":
        return False
    _store(job, full)
    return True


def teacher(job: Job, stage: Stage) -> Teacher:
    """The teacher of ``stage``: ``job.full``, if that was kept, else from the disk, else computed block by
    block."""
    text = _text(job, stage)
    if job.full is not None:
        full, job.full = job.full, None
        return Teacher(full, text.rows, job.world)
    here = slice(job.world.rank, None, job.world.size)
    tokens, positions_NT = text.tokens[here], None if text.positions is None else text.positions[here]
    stream = job.activations("teacher", tokens, _dtype(job))
    if stored_at(job, {"teacher": stream}) is None:
        teaching = original(job)
        teaching.embed(tokens, stream, positions_NT=positions_NT)
        for index in range(job.blocks):
            block = teaching.lm.load_block(index, dtype=torch.float32)
            pass_through(teaching, index, block, text.name, stream, _dtype(job), positions_NT=positions_NT)
            job.report.leave_if_asked()
        _store(job, stream)
    return Teacher(stream, text.rows, job.world)


def _store(job: Job, stream: ActivationStore) -> None:
    if job.plan.recovery.streams == "stored":
        store_at(job, job.blocks, {"teacher": stream})
