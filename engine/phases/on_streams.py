"""What stages of blocks have in common whose blocks are made one behind the other, on activation streams.

A stream is a function of the text and of the blocks before it, so it need not be saved to be safe. A resumed
run brings its streams to the first unfinished block: from the files of the last stored border, where the plan
has them stored, else from the text; then through the finished blocks, by the code that did it first.

With several ranks each has its share of the sequences, and sends them through every block itself.

A block that is finished is committed while the quantized stream passes it. Once that is done nothing of it
can be lost: a kill in the middle of the passage costs the passage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.data.activations import ActivationStore
from engine.phases.job import Job, compute_dtype
from engine.phases.passage import forget_streams, pass_through, store_at, stored_at
from engine.run.facts import MICRO_BATCH, block_entry, losses_fact

FULL, QUANTIZED = "full", "quantized"
"""The streams through the blocks as they came, and through the quantized ones."""
Streams = Mapping[str, ActivationStore]


class OnStreams:
    """A stage of blocks on streams; how one block is made is its own."""

    stage = ""
    """Its name."""
    names: tuple[str, ...] = (QUANTIZED,)
    """The streams that it needs."""

    def __init__(self, job: Job) -> None:
        self.job, self.config = job, getattr(job.config, self.stage)
        self.text = job.tokens.of(self.stage)
        self.tokens_NT = self.text.tokens_NT[job.world.rank :: job.world.size]
        """Of the sequences that lie here."""
        self.dtype = compute_dtype(self.config.compute_dtype, job.device)

    def make(self, index: int, streams: Streams) -> None:
        """Quantize block ``index``, end with :meth:`commit`."""
        raise NotImplementedError

    def end(self, streams: Streams) -> None:
        """After the last block."""
        forget_streams(self.job)

    def run(self) -> None:
        """All blocks; where all of them were finished before, only that is told."""
        job = self.job
        if job.all_blocks_finished():
            for index in range(job.blocks):
                job.report.block_started(index, job.blocks)
                self._restored(index)
            return
        with self._streams() as streams:
            border = self._restore(streams)
            for index in range(job.blocks):
                job.report.block_started(index, job.blocks)
                if not job.is_finished(index):
                    self.make(index, streams)
                    continue
                if index >= border:
                    self._replay(index, streams)
                self._restored(index)
            self.end(streams)

    def _restored(self, index: int) -> None:
        """Tell of a block that an earlier attempt finished; its losses may be lost, and only tell."""
        job = self.job
        job.report.block_finished(**(job.store.fact(losses_fact(index)) or {}), restored=True)

    @contextmanager
    def _streams(self) -> Iterator[Streams]:
        job, streams = self.job, dict[str, ActivationStore]()
        with ExitStack() as opened:
            for name in self.names:
                streams[name] = job.activations(name, self.tokens_NT, self.dtype)
                opened.callback(self._close, streams[name])
            yield streams

    def _close(self, stream: ActivationStore) -> None:
        """Unless a later stage learns from it."""
        if stream is not self.job.full:
            stream.close()

    def _restore(self, streams: Streams) -> int:
        """Fill the streams; returns how many blocks they have passed."""
        border = stored_at(self.job, streams)
        if border is not None:
            return border
        self.job.embed(self.tokens_NT, *streams.values())
        return 0

    def _replay(self, index: int, streams: Streams) -> None:
        """Past a finished block, by the code that did it first."""
        block = self.load(index, streams)
        self.job.packed(index).install(block)
        if index + 1 < self.job.blocks:
            pass_through(self.job, index, block, QUANTIZED, streams[QUANTIZED], self.dtype)
        self._leave(index + 1, streams)

    def load(self, index: int, streams: Streams) -> nn.Module:
        """The block as it came, which the full-precision stream has passed."""
        block = self.job.lm.load_block(index, dtype=torch.float32)
        if FULL in streams:
            pass_through(self.job, index, block, FULL, streams[FULL], self.dtype)
        return block

    def commit(
        self,
        index: int,
        block: nn.Module,
        kept: dict[str, Tensor],
        losses: Mapping[str, Any],
        micro_batch: int,
        streams: Streams,
    ) -> None:
        """Publish the block, of which ``kept`` stays, while the quantized stream passes it; ``micro_batch``
        sequences were what memory sufficed for."""
        job, store = self.job, self.job.store
        store.remember(losses_fact(index), dict(losses))
        if micro_batch < self.config.batch_size // job.world.size:
            before = store.fact(MICRO_BATCH)
            history = before if isinstance(before, list) else []
            store.remember(MICRO_BATCH, [*history, [index, micro_batch]])
        committing = job.checkpoints.committing(self.stage, index, {block_entry(index): kept})
        if index + 1 == job.blocks:
            with committing:
                pass
        else:
            pass_through(job, index, block, QUANTIZED, streams[QUANTIZED], self.dtype, committing)
        job.report.block_finished(**losses)
        self._leave(index + 1, streams)

    def _leave(self, border: int, streams: Streams) -> None:
        """The streams, which have passed so many blocks, are stored where the plan wants it."""
        job = self.job
        if border == job.blocks:
            return
        recovery = job.plan.recovery
        if recovery.streams == "stored" and border % recovery.streams_every == 0:
            store_at(job, border, streams)
        job.report.leave_if_asked()
