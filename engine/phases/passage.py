"""Activation streams on their way through the blocks, and at rest on the disk.

Whoever needs a stream at some block gets the same bits, whether it was computed now, computed again after a
kill, or read back: the passage is one function, and where memory once sufficed for fewer sequences at a time
only, that is remembered and done the same way again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import msgspec
import torch
from torch import Tensor, nn

from engine.checkpoints.streams import StoredStreams, delete_streams, read_streams, write_streams
from engine.data.activations import ActivationStore
from engine.errors import EqatError, ExitCode
from engine.methods.advance import Portions, advance
from engine.phases.job import Job
from engine.run.facts import STREAMS, halvings_fact

STREAM_SILENCE = 600.0
"""Seconds that one large file may take unheard."""


def pass_through(
    job: Job,
    index: int,
    block: nn.Module,
    name: str,
    stream: ActivationStore,
    dtype: torch.dtype,
    beside: AbstractContextManager[None] | None = None,
    positions_NT: Tensor | None = None,
) -> None:
    """The stream called ``name`` through block ``index``, in place; ``beside`` is entered meanwhile.
    Positions are those of packed samples."""
    kept = job.store.fact(halvings_fact(name, job.world.rank)) or ()
    portions = Portions(job.together(stream.shape), kept)
    with beside or nullcontext():
        advance(job.lm, index, block, stream, portions, dtype, job.report, positions_NT)
    for rank, halvings in enumerate(job.world.gathered(portions.halvings, list[tuple[int, int]])):
        if halvings:
            job.store.remember(halvings_fact(name, rank), [list(halving) for halving in halvings])


def stored_at(job: Job, streams: Mapping[str, ActivationStore]) -> int | None:
    """Fill ``streams`` from the disk and return the blocks they have passed; none when they are not there.

    Then they hold anything, and have to be computed.
    """
    stored = StoredStreams.from_fact(job.store.fact(STREAMS))
    if stored is None or set(stored.sha256) != set(streams):
        return None
    job.report.expect_silence(STREAM_SILENCE)
    problem = read_streams(job.run.cache_dir, stored, streams, job.report.leave_if_asked)
    if not problem:
        return stored.border
    job.report.warning("streams", f"stored activations cannot be used, computing them again: {problem}")
    return None


def store_at(job: Job, border: int, streams: Mapping[str, ActivationStore]) -> None:
    """Write ``streams``, which have passed ``border`` blocks, and publish that; older ones are deleted.

    A full disk costs the run nothing but time after a kill.
    """
    folder = job.run.cache_dir
    job.report.expect_silence(STREAM_SILENCE)
    try:
        stored = write_streams(folder, border, streams, job.report.leave_if_asked)
    except EqatError as error:
        if error.exit_code != ExitCode.DISK_FULL:
            raise
        job.report.warning(
            "streams",
            "the disk has no room for the activations: a resumed run will compute them again",
            hint=error.hint,
        )
        return
    job.store.remember(STREAMS, msgspec.to_builtins(stored))
    job.checkpoints.commit(job.report.phase_name, border - 1, beside=(stored.bytes, stored.seconds))
    delete_streams(folder, keep=stored)


def forget_streams(job: Job) -> None:
    """Nobody needs stored streams any more."""
    job.store.forget(STREAMS)
    delete_streams(job.run.cache_dir)
