"""The stages that make one block after the other: ``rtn``, whose blocks do not know of each other, and
``gptq`` and ``block_ap`` on activation streams that run through the blocks."""

from __future__ import annotations

import torch

from engine.checkpoints.snapshots import resumable
from engine.config.kept_latents import kept_latents
from engine.methods.blockwise import reconstruction
from engine.methods.blockwise.block_ap import train_block
from engine.methods.blockwise.gptq_block import BlockOnStream, gptq_block, rounded_at_a_time
from engine.methods.blockwise.rtn import round_to_nearest
from engine.methods.blockwise.start import AtOnce
from engine.phases.job import Job
from engine.phases.latents import named_latents
from engine.phases.on_streams import FULL, QUANTIZED, OnStreams, Streams
from engine.phases.teacher import keep_as_teacher
from engine.run.facts import MICRO_BATCH, block_entry, micro_batch_after


def round_blocks(job: Job) -> None:
    """Without a method of blocks: every block to its initial grid."""
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


def quantize_blocks(job: Job) -> None:
    """GPTQ over all blocks."""
    _GPTQ(job).run()


def train_blocks(job: Job) -> None:
    """Block-AP over all blocks.

    Leaves the full-precision stream behind the last of them in ``job.full`` where end-to-end training learns
    from it; not when all blocks were finished before.
    """
    _BlockAP(job).run()


class _GPTQ(OnStreams):
    stage = "gptq"

    def make(self, index: int, streams: Streams) -> None:
        job, config = self.job, self.config
        block = self.load(index, streams)
        measured = len(job.world.share(self.text.train))
        on = BlockOnStream(job.lm, index, block, streams[QUANTIZED], measured, self.dtype, job.world)
        sequences = micro_batch_after(job.store.fact(MICRO_BATCH)) or config.batch_size
        at_once = AtOnce(sequences, rounded_at_a_time(job.device))
        keeps = kept_latents(job.config)
        packed, found = gptq_block(on, config, job.config.grid, job.report, at_once, keeps=keeps)
        # As Block-AP's: how far the block was off where it began, and is now.
        losses = {"initial_loss": found.plain_error, "final_loss": found.error}
        kept = packed.tensors() | named_latents(found.kept)
        self.commit(index, block, kept, losses, found.start.at_once.sequences, streams)


class _BlockAP(OnStreams):
    stage = "block_ap"
    names = (FULL, QUANTIZED)

    def make(self, index: int, streams: Streams) -> None:
        job = self.job
        block = self.load(index, streams)
        with resumable(job.checkpoints, "block_ap", index) as keeper:
            result = train_block(
                job.lm,
                index,
                block,
                reconstruction.Streams(streams[FULL], streams[QUANTIZED], self.text.train, job.world),
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
                gptq=job.config.gptq,
            )
        losses = {
            "initial_loss": result.initial_loss,
            "final_loss": result.final_loss,
            "val_loss": result.val_loss,
        }
        kept = result.packed.tensors() | named_latents(result.latents)
        self.commit(index, block, kept, losses, result.micro_batch, streams)

    def end(self, streams: Streams) -> None:
        if keep_as_teacher(self.job, streams[FULL]):
            self.job.full = streams[FULL]
        else:
            super().end(streams)
