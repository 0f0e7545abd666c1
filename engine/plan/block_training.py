"""What it costs to train one block after the other on two activation streams, whatever the step."""

from __future__ import annotations

import math
from collections.abc import Iterator

from engine.config.run import RunConfig
from engine.plan.costs import Ladder, Pain, Training, halves
from engine.plan.estimate import CONSTANTS, Workload
from engine.plan.memory_terms import Memory, training_memory
from engine.plan.object_sizes import block_bytes
from engine.plan.passages import compiling_form, passing
from engine.plan.portions import passed_together
from engine.plan.rates import Speed, load_seconds, search_seconds, unpacking
from engine.plan.streams import shares_teacher, stored_pairs, streams_bytes, teacher_bytes
from engine.plan.training_costs import TrainingCosts


class BlockTraining(TrainingCosts):
    """Of a stage that trains block by block. Its own are the memory and the seconds of a step."""

    def block_memory(self, work: Workload) -> dict[str, int]:
        """What training a block takes on the device, by what takes it."""
        raise NotImplementedError

    def step_seconds(self, work: Workload, rates: Speed) -> float:
        """Of one optimizer step."""
        raise NotImplementedError

    def memory(self, work: Workload) -> Memory:
        streams, copies = streams_bytes(work), self.copies_bytes(work)
        return training_memory(work, self.block_memory(work), streams, self.snapshot_bytes(work), copies)

    # Time

    def seconds(self, work: Workload, rates: Speed, stored_bytes: int) -> float:
        compiling = 2 * compiling_form(work, rates)
        compiling += CONSTANTS.gpu_compile if self.steps(work, rates).compiled else 0.0
        each = self.block_seconds(work, rates)
        return load_seconds(work.arch, stored_bytes) + compiling + work.arch.blocks * each

    def block_seconds(self, work: Workload, rates: Speed) -> float:
        """One block: where it starts, its steps, a forward pass for validation, 2 to advance streams."""
        section = self.section(work.config)
        length, batch = section.sequence_length, section.batch_size
        steps = section.epochs * math.ceil(section.sequences / batch)
        validated = (section.epochs + 1) * section.val_sequences
        advanced = 2 * (section.sequences + section.val_sequences)
        return (
            steps * (self.step_seconds(work, rates) + self.adding_seconds(work, rates))
            + passing(work, rates, validated, length, batch)
            + passing(work, rates, advanced, length, passed_together(work, batch, length))
            + self.start_seconds(work, rates)
        )

    def start_seconds(self, work: Workload, rates: Speed) -> float:
        """Finding where one block's grids start."""
        return search_seconds(work, rates)

    def passage_seconds(self, work: Workload, rates: Speed) -> float:
        """Both streams through a finished block: one through its float weights, one through packed ones."""
        section = self.section(work.config)
        sequences, length = section.sequences + section.val_sequences, section.sequence_length
        at_a_time = passed_together(work, section.batch_size, length)
        one = passing(work, rates, sequences, length, at_a_time)
        return 2 * one + unpacking(work, rates)

    # Checkpoints

    def training(self, work: Workload, rates: Speed, stored_bytes: int) -> Training:
        blocks = work.arch.blocks
        reading = load_seconds(work.arch, stored_bytes) / blocks
        return Training(
            phase=self.stage.name,
            times=blocks,
            whole=reading + self.block_seconds(work, rates),
            passage=reading + self.passage_seconds(work, rates),
            step=self.step_seconds(work, rates),
            bytes=self.snapshot_bytes(work),
        )

    def kept(self, work: Workload, streams_every: int, snapshots: int) -> int:
        return max(self._moments(work, streams_every, snapshots))

    def _moments(self, work: Workload, every: int, snapshots: int) -> Iterator[int]:
        """The peak is one of these."""
        arch, one = work.arch, block_bytes(work.arch, work.config.grid, self.latents(work.config))
        pairs, pair = stored_pairs(work, every), streams_bytes(work)
        snapshot = self.snapshot_bytes(work)
        held = min(1, pairs) * pair
        # The last block is trained, and committed: then the older generation still has its last snapshot.
        yield (arch.blocks - 1) * one + held + snapshots * snapshot
        yield arch.blocks * one + held + min(2, snapshots) * snapshot
        if pairs:  # the streams are stored for the last time
            yield pairs * every * one + min(2, pairs) * pair + min(1, snapshots) * snapshot
        if every and shares_teacher(work):
            yield arch.blocks * one + held + teacher_bytes(work) + min(1, snapshots) * snapshot

    # What does not fit

    def smaller(self, config: RunConfig) -> Iterator[Ladder]:
        section, name = self.section(config), self.section_name
        yield Ladder(Pain.OTHER_STEPS, name, "batch_size", halves(section.batch_size, 1), is_batch=True)
        yield Ladder(Pain.LESS_TEXT, name, "sequences", halves(section.sequences, 128))
        yield Ladder(Pain.SHORTER_TEXT, name, "sequence_length", halves(section.sequence_length, 256))
