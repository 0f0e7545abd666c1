"""E2E-QP's teacher: the full-precision model's last hidden states on the text that is trained on.

Block-AP's full-precision stream ends as just that where its text contains E2E-QP's and its arithmetic is the
same: :mod:`engine.plan.streams` says whether the configuration allows it, then the tokens decide. Otherwise,
and in a run that was resumed behind Block-AP, the text goes through the original blocks once more, unless the
plan had it stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.activations import ActivationStore
from engine.methods.network.teacher import Teacher, positions
from engine.phases.job import Job, compute_dtype
from engine.phases.passage import pass_through, store_at, stored_at
from engine.plan.streams import may_share_teacher, taught


@dataclass(frozen=True)
class _Text:
    name: str
    tokens: Tensor
    rows: Tensor | None
    """Where E2E-QP's own sequences lie in ``tokens``; none when they are the same."""


def is_taught(job: Job) -> bool:
    """Whether end-to-end training learns from a teacher."""
    return taught(job.config) is not None


def _text(job: Job) -> _Text:
    """The text whose last hidden states teach.

    A resumed run computes Block-AP's stream anew from the same text in the same batches: in other batches,
    the last bits would be others.
    """
    alone = _Text("teacher", job.tokens.e2e_qp, None)
    if not may_share_teacher(job.config, cuda=job.device.type == "cuda"):
        return alone
    rows = positions(job.tokens.e2e_qp, job.tokens.block_ap)
    return alone if rows is None else _Text("full", job.tokens.block_ap, rows)


def _dtype(job: Job) -> torch.dtype:
    return compute_dtype(job.config.e2e_qp.compute_dtype, job.device)


def keep_as_teacher(job: Job, full: ActivationStore) -> bool:
    """Whether Block-AP's full-precision stream, behind the last block, is the teacher; stores it then, where
    the plan stores streams."""
    if not is_taught(job) or _text(job).name != "full":
        return False
    _store(job, full)
    return True


def teacher(job: Job) -> Teacher:
    """The teacher: ``job.full``, if that was kept, else from the disk, else computed one block at a time."""
    text = _text(job)
    if job.full is not None:
        full, job.full = job.full, None
        return Teacher(full, text.rows)
    stream = job.activations("teacher", text.tokens, _dtype(job))
    if stored_at(job, {"teacher": stream}) is None:
        job.embed(text.tokens, stream)
        for index in range(job.blocks):
            block = job.lm.load_block(index, dtype=torch.float32)
            pass_through(job, index, block, text.name, stream, _dtype(job))
            job.report.leave_if_asked()
        _store(job, stream)
    return Teacher(stream, text.rows)


def _store(job: Job, stream: ActivationStore) -> None:
    if job.plan.recovery.streams == "stored":
        store_at(job, job.blocks, {"teacher": stream})
