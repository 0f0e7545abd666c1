"""The stages that make one block after the other: ``rtn``, and ``block_ap`` with the activation streams that
run through the blocks.

A stream is a function of the text and of the blocks before it, so it need not be saved to be safe. A resumed
run brings both streams to the first unfinished block: from the files of the last stored border, where the
plan has them stored, else from the text; then through the finished blocks, by the code that did it first.

A block that Block-AP has finished is committed while the quantized stream passes it. Once that is done
nothing of it can be lost: a kill in the middle of the passage costs the passage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.checkpoints.snapshots import resumable
from engine.config.kept_latents import kept_latents
from engine.methods.blockwise.block_ap import BlockResult, train_block
from engine.methods.blockwise.reconstruction import Streams
from engine.methods.blockwise.rtn import round_to_nearest
from engine.phases.job import Job, compute_dtype
from engine.phases.latents import named_latents
from engine.phases.passage import forget_streams, pass_through, store_at, stored_at
from engine.phases.teacher import keep_as_teacher
from engine.run.facts import MICRO_BATCH, block_entry, losses_fact, micro_batch_after


def round_blocks(job: Job) -> None:
    """Without Block-AP: every block to its initial grid."""
    for index in range(job.blocks):
        job.report.block_started(index, job.blocks)
        if job.is_finished(index):
            job.report.block_finished(restored=True)
            continue
        block = job.lm.load_block(index, dtype=torch.float32)
        packed = round_to_nearest(block, job.lm.linear_names(index), job.config.grid)
        job.checkpoints.commit("rtn", index, {block_entry(index): packed.tensors()})
        job.report.block_finished()
        job.report.leave_if_asked()


def train_blocks(job: Job) -> None:
    """Block-AP over all blocks.

    Leaves the full-precision stream behind the last of them in ``job.full`` where end-to-end training learns
    from it; not when all blocks were finished before.
    """
    if not job.all_blocks_finished():
        _BlockAP(job).run()
        return
    for index in range(job.blocks):
        job.report.block_started(index, job.blocks)
        _restored(job, index)


def _restored(job: Job, index: int) -> None:
    """Tell of a block that an earlier attempt finished; its losses may be lost, and only tell."""
    job.report.block_finished(**(job.store.fact(losses_fact(index)) or {}), restored=True)


class _BlockAP:
    def __init__(self, job: Job) -> None:
        self.job, self.config = job, job.config.block_ap
        self.text = job.tokens.of("block_ap")
        self.dtype = compute_dtype(self.config.compute_dtype, job.device)

    def run(self) -> None:
        job = self.job
        with self._streams() as streams:
            border = self._restore(streams)
            for index in range(job.blocks):
                job.report.block_started(index, job.blocks)
                if not job.is_finished(index):
                    self._train(index, streams)
                    continue
                if index >= border:
                    self._replay(index, streams)
                _restored(job, index)
            if keep_as_teacher(job, streams.full):
                job.full = streams.full
            else:
                forget_streams(job)

    @contextmanager
    def _streams(self) -> Iterator[Streams]:
        job = self.job
        full = job.activations("full", self.text.tokens_NT, self.dtype)
        quantized = job.activations("quantized", self.text.tokens_NT, self.dtype)
        try:
            yield Streams(full, quantized, self.text.train)
        finally:
            quantized.close()
            if full is not job.full:
                full.close()

    def _restore(self, streams: Streams) -> int:
        """Fill the streams; returns how many blocks they have passed."""
        border = stored_at(self.job, {"full": streams.full, "quantized": streams.quantized})
        if border is not None:
            return border
        self.job.embed(self.text.tokens_NT, streams.full, streams.quantized)
        return 0

    def _replay(self, index: int, streams: Streams) -> None:
        """Both streams past a finished block, by the code that did it first."""
        block = self.job.lm.load_block(index, dtype=torch.float32)
        pass_through(self.job, index, block, "full", streams.full, self.dtype)
        self.job.packed(index).install(block)
        if index + 1 < self.job.blocks:
            pass_through(self.job, index, block, "quantized", streams.quantized, self.dtype)
        self._leave(index + 1, streams)

    def _train(self, index: int, streams: Streams) -> None:
        job = self.job
        block = job.lm.load_block(index, dtype=torch.float32)
        pass_through(job, index, block, "full", streams.full, self.dtype)
        with resumable(job.checkpoints, "block_ap", index) as keeper:
            result = train_block(
                job.lm,
                index,
                block,
                streams,
                self.config,
                job.config.grid,
                seed=job.seed(index),
                dtype=self.dtype,
                progress=job.report,
                micro_batch=micro_batch_after(job.store.fact(MICRO_BATCH)),
                snapshot=keeper.snapshot,
                keeper=keeper,
                world=job.world,
                fast=job.plan.fast,
                compiles=job.plan.compiles,
                kernels=job.takes_kernels,
                keeps=kept_latents(job.config),
            )
        self._commit(index, block, result, streams)

    def _commit(self, index: int, block: torch.nn.Module, result: BlockResult, streams: Streams) -> None:
        """Publish the block while the quantized stream passes it."""
        job, store = self.job, self.job.store
        losses: dict[str, Any] = {
            "initial_loss": result.initial_loss,
            "final_loss": result.final_loss,
            "val_loss": result.val_loss,
        }
        store.remember(losses_fact(index), losses)
        if result.micro_batch < self.config.batch_size:
            before = store.fact(MICRO_BATCH)
            history = before if isinstance(before, list) else []
            store.remember(MICRO_BATCH, [*history, [index, result.micro_batch]])
        entries = {block_entry(index): result.packed.tensors() | named_latents(result.latents)}
        committing = job.checkpoints.committing("block_ap", index, entries)
        if index + 1 == job.blocks:
            with committing:
                pass
        else:
            pass_through(job, index, block, "quantized", streams.quantized, self.dtype, committing)
        job.report.block_finished(**losses)
        self._leave(index + 1, streams)

    def _leave(self, border: int, streams: Streams) -> None:
        """Both streams, which have passed so many blocks, are stored where the plan wants it."""
        job = self.job
        if border == job.blocks:
            return
        recovery = job.plan.recovery
        if recovery.streams == "stored" and border % recovery.streams_every == 0:
            store_at(job, border, {"full": streams.full, "quantized": streams.quantized})
        job.report.leave_if_asked()
