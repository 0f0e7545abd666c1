"""What it costs to train the whole quantized network at once, whatever is trained of it.

Beside the fields of every training, its section has ``micro_batch_size`` (0 leaves it to the plan) and
``activation_checkpointing``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import msgspec

from engine.config.run import RunConfig
from engine.plan.costs import Ladder, Pain, Training, down_to_one, halves
from engine.plan.estimate import Workload
from engine.plan.memory_terms import Memory, training_memory
from engine.plan.passages import passing
from engine.plan.portions import passed_together
from engine.plan.rates import Speed, load_seconds
from engine.plan.streams import shares_teacher, streams_batch
from engine.plan.training_costs import TrainingCosts

MOST_AT_A_TIME = 1024
"""Sequences; what passes at a time is full long before."""


class NetworkTraining(TrainingCosts):
    """Of a stage that trains all blocks together. Its own are the memory and the seconds of the training."""

    def network_memory(self, work: Workload) -> dict[str, int]:
        """What the training takes on the device, by what takes it."""
        raise NotImplementedError

    def training_seconds(self, work: Workload, rates: Speed) -> float:
        """Of all steps and validations."""
        raise NotImplementedError

    def compiling_seconds(self, work: Workload, rates: Speed) -> float:
        """Before the first step."""
        return 0.0

    def memory(self, work: Workload) -> Memory:
        teacher, copies = self.teacher_bytes(work), self.copies_bytes(work)
        return training_memory(work, self.network_memory(work), teacher, self.snapshot_bytes(work), copies)

    def recomputation(self, config: RunConfig) -> Literal["auto", "on", "off"]:
        # A section that leaves no choice keeps its activations.
        wanted: Literal["auto", "on", "off"] = getattr(
            self.section(config), "activation_checkpointing", "off"
        )
        return wanted

    def micro_batch(self, config: RunConfig) -> int | None:
        asked: int | None = getattr(self.section(config), "micro_batch_size", None)
        return asked

    def micro_batches(self, config: RunConfig) -> list[int]:
        batch = self.section(config).batch_size
        return [count for count in range(1, min(batch, MOST_AT_A_TIME) + 1) if batch % count == 0]

    def with_micro_batch(self, work: Workload, count: int) -> Workload:
        section = msgspec.structs.replace(self.section(work.config), micro_batch_size=count)
        config = msgspec.structs.replace(work.config, **{self.section_name: section})
        return msgspec.structs.replace(work, config=config)

    def teacher_bytes(self, work: Workload) -> int:
        """The last hidden states that it learns from."""
        text = self.teacher_text(work.config)
        return text.stream_bytes(work) if text else 0

    # Time

    def seconds(self, work: Workload, rates: Speed, stored_bytes: int) -> float:
        load = load_seconds(work.arch, stored_bytes)
        again = self.teacher_text(work.config) is not None and not shares_teacher(work)
        taught = self.teacher_seconds(work, rates) if again else 0.0
        section = self.section(work.config)
        steps = section.epochs * math.ceil(section.sequences / section.batch_size)
        trained = self.training_seconds(work, rates) + self.compiling_seconds(work, rates)
        return load + trained + steps * self.adding_seconds(work, rates) + taught

    def teacher_seconds(self, work: Workload, rates: Speed) -> float:
        """Its text through the full-precision blocks."""
        section = self.section(work.config)
        sequences, length = section.sequences + section.val_sequences, section.sequence_length
        at_a_time = passed_together(work, streams_batch(work.config), length)
        return work.arch.blocks * passing(work, rates, sequences, length, at_a_time)

    # Checkpoints

    def training(self, work: Workload, rates: Speed, stored_bytes: int) -> Training:
        section, load = self.section(work.config), load_seconds(work.arch, stored_bytes)
        trained = self.training_seconds(work, rates)
        taught = self.teacher_bytes(work)
        return Training(
            phase=self.stage.name,
            times=1,
            whole=trained,
            passage=0.0,
            step=trained / (section.epochs * math.ceil(section.sequences / section.batch_size)),
            bytes=self.snapshot_bytes(work),
            load=load,
            teacher=load + self.teacher_seconds(work, rates) if taught else 0.0,
        )

    def kept(self, work: Workload, streams_every: int, snapshots: int) -> int:
        teacher = self.teacher_bytes(work) if streams_every else 0
        return teacher + max(snapshots * self.snapshot_bytes(work), self.result_bytes(work))

    # What does not fit

    def smaller(self, config: RunConfig) -> Iterator[Ladder]:
        section, name = self.section(config), self.section_name
        one = down_to_one(section.micro_batch_size)
        yield Ladder(Pain.SLOWER, name, "micro_batch_size", one, is_batch=True)
        if section.activation_checkpointing == "off":
            yield Ladder(Pain.SLOWER, name, "activation_checkpointing", ["on"])
        yield Ladder(Pain.LESS_TEXT, name, "sequences", halves(section.sequences, 128))
        yield Ladder(Pain.SHORTER_TEXT, name, "sequence_length", halves(section.sequence_length, 256))
