"""What a stage's part of the plan answers, and who answers for which stage.

:class:`StageCosts` lists the questions; memory, time, disk, recovery and fit are sums and loops over the
answers of the stages that a configuration makes. Its own answers are those of a stage about which nothing
else is known: it goes over the weights once, like rounding, and trains nothing.
:class:`~engine.plan.block_training.BlockTraining` and
:class:`~engine.plan.network_training.NetworkTraining` answer for a training but for what is its own.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import msgspec

from engine.config.latents import Downcast
from engine.config.run import RunConfig
from engine.config.stages import Stage, stages_of
from engine.config.tables import load_named
from engine.plan.estimate import Workload
from engine.plan.memory_terms import Memory, rounding
from engine.plan.object_sizes import block_bytes, scales_bytes
from engine.plan.rates import Speed, load_seconds, search_seconds


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """Calibration text that a stage trains on, and the arithmetic that it passes in."""

    section: str
    """Of the configuration, where it is asked for."""
    sequences: int
    val_sequences: int
    sequence_length: int
    compute_dtype: str

    @property
    def tokens(self) -> int:
        return (self.sequences + self.val_sequences) * self.sequence_length

    def stream_bytes(self, work: Workload) -> int:
        """Hidden states of all of it, once."""
        return self.tokens * work.arch.hidden * work.bytes_of(self.compute_dtype)


class Steps(NamedTuple):
    """How a training takes its steps."""

    recorded: bool = False
    """Recorded, and by one kernel a linear."""
    compiled: bool = False


class Training(NamedTuple):
    """What a kill can undo, or a restart does again: a block's training, or that of the whole network."""

    phase: str
    times: int
    """How often in a run."""
    whole: float
    """Seconds from one commit to the next."""
    passage: float
    """Of these, sending activations through a finished block, in which no snapshot can be taken."""
    step: float
    bytes: int
    """Of a snapshot."""
    load: float = 0.0
    """Reading all blocks, before it can go on."""
    teacher: float = 0.0
    """Computing what it learns from again; 0 where it learns from nobody."""

    @property
    def border(self) -> float:
        """Seconds of ``whole`` that lie outside of the training itself."""
        return min(self.passage, self.whole)


class Pain(enum.IntEnum):
    """What a smaller setting costs, the least painful first."""

    SLOWER = 0
    """The result stays what it is."""
    OTHER_STEPS = 1
    LESS_TEXT = 2
    SHORTER_TEXT = 3
    OTHER_MEASURE = 4
    """Perplexities no longer compare with those at the usual context."""


class Ladder(NamedTuple):
    """A setting that can be lowered, and the values to try."""

    pain: Pain
    section: str
    field: str
    values: Sequence[Any]
    is_batch: bool = False
    """A phase that runs out of GPU memory halves this by itself, down to one."""


def halves(value: int, lowest: int) -> list[int]:
    """Halves of ``value``, as long as they begin above ``lowest``."""
    values = []
    while value > lowest:
        value //= 2
        values.append(value)
    return values


def down_to_one(value: int) -> list[int]:
    """One, where ``value`` is more."""
    return [1] if value > 1 else []


class StageCosts:
    """A stage's part of the plan."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def warnings(self, config: RunConfig) -> Iterator[str]:
        """What of its settings will disappoint, with what would not."""
        yield from ()

    # What it reads

    def text(self, config: RunConfig) -> Text | None:
        """The calibration text that it learns from. Where it makes the blocks, streams of activations of that
        text pass through them."""
        return None

    def streams(self) -> int:
        """How many: one through the blocks as they came and one through the quantized ones, or only the
        latter."""
        return 2

    def streams_batch(self, config: RunConfig) -> int:
        """Sequences of a stream that pass through a block together."""
        return config.block_ap.batch_size

    def teacher_text(self, config: RunConfig) -> Text | None:
        """The text whose last hidden states in full precision teach it."""
        return None

    # Memory

    def memory(self, work: Workload) -> Memory:
        """Its peak, beside embeddings and head."""
        return Memory(rounding(work))

    def while_measured(self, work: Workload) -> dict[str, int]:
        """What making a block of it takes while it is measured, if blocks of it are made only then."""
        return {}

    def recomputation(self, config: RunConfig) -> Literal["auto", "on", "off"]:
        """Whether its backward pass computes activations again, or whether memory decides."""
        return "off"

    def recomputes(self, work: Workload) -> bool:
        """The same, decided."""
        wanted = self.recomputation(work.config)
        return work.short_of_memory if wanted == "auto" else wanted == "on"

    def micro_batch(self, config: RunConfig) -> int | None:
        """How many sequences pass at a time, where a setting of its own says so; 0 leaves it to the plan."""
        return None

    def micro_batches(self, config: RunConfig) -> Sequence[int]:
        """The numbers that this may be, rising."""
        return ()

    def with_micro_batch(self, work: Workload, count: int) -> Workload:
        """The same work with ``count`` of them."""
        return work

    # Time

    def seconds(self, work: Workload, rates: Speed, stored_bytes: int) -> float:
        """Of its phase; ``stored_bytes`` of weights are read."""
        return load_seconds(work.arch, stored_bytes) + work.arch.blocks * search_seconds(work, rates)

    def steps(self, work: Workload, rates: Speed) -> Steps:
        """How it trains here."""
        return Steps()

    # Checkpoints

    def training(self, work: Workload, rates: Speed, stored_bytes: int) -> Training | None:
        """Its training, for whoever decides how often that is checkpointed; none where it trains nothing."""
        return None

    def snapshot_bytes(self, work: Workload) -> int:
        """The state of its training in the middle."""
        return 0

    def result_bytes(self, work: Workload) -> int:
        """Of the objects that it adds: a block each, or scales and zero points of each."""
        if self.stage.scope != "block":
            return work.arch.blocks * scales_bytes(work.arch, work.config.grid)
        return work.arch.blocks * block_bytes(work.arch, work.config.grid, self.latents(work.config))

    def latents(self, config: RunConfig) -> Downcast | None:
        """How latents of its blocks are kept; none where its blocks have no such."""
        return None

    def kept(self, work: Workload, streams_every: int, snapshots: int) -> int:
        """Bytes of its own on the disk at the peak of its phase, streams included: with so many
        ``snapshots`` and streams stored at every ``streams_every``-th border, if that is not 0."""
        return self.result_bytes(work)

    # What does not fit

    def smaller(self, config: RunConfig) -> Iterator[Ladder]:
        """Its settings that can be lowered."""
        return iter(())


@lru_cache
def costs_of(stage: Stage) -> StageCosts:
    """The part of the plan that ``stage`` names; the general one where it names none."""
    if not stage.costs:
        return StageCosts(stage)
    made: StageCosts = load_named(stage.costs)(stage)
    return made


def made_costs(config: RunConfig) -> list[StageCosts]:
    """The parts of the stages that ``config`` makes, in order."""
    return [costs_of(stage) for stage in stages_of(config)]
