"""What an interruption costs, and what it costs to be ready for one.

    finished block   its weights are committed at once
    training         a snapshot (parameters, moments, best state) so often that a kill loses at most
                     runtime.checkpoint_minutes, unless the snapshots would take more than half of
                     runtime.checkpoint_share; training waits for the copy, a thread writes it
    streams          stored at every n-th border between blocks, with the smallest n for which that takes no
                     more than the other half; where that n is so large that it hardly helps, a resumed run
                     computes them from the text again

Numbers of this sort decide whether 64 GiB are written after every block of a 7B model (on a GPU that computes
them in five seconds they are not), so they are the plan's, stated before the run, and the engine's too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

from engine.config.runtime import RuntimeConfig
from engine.config.stages import measured_stage
from engine.plan.costs import Training, made_costs
from engine.plan.estimate import CONSTANTS, Workload, size_text, time_text
from engine.plan.streams import stored_bytes, stored_pairs, streamed, streams_bytes, teacher_bytes

PART_OF_THE_PROMISE = 0.8
"""Snapshots are taken after this part of ``checkpoint_minutes``: one counts only when it is written."""
SNAPSHOT_SHARE = 0.5
"""Part of ``checkpoint_share`` for snapshots; the rest is for stored streams."""
FILES_OF_A_COMMIT = 3
"""An object, the generation, CURRENT."""


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """Checkpoints and what they save. Sizes are bytes, times seconds; all of them are estimates."""

    interval_seconds: float
    """Between two snapshots of one training; 0 when there are none."""
    snapshots: dict[str, int]
    """How many come due in each training, by the phase. A stop takes one wherever it comes."""
    lost_seconds: float
    """Training that a kill can undo at most."""
    restarted_seconds: float
    """The longest evaluation or export: they begin again when interrupted."""
    checkpoint_bytes: int
    """The largest snapshot."""
    checkpoint_seconds: float
    """For which training waits."""
    write_seconds: float
    """Which its writing goes on beside training; on the CPU it takes one of the cores that train."""
    share: float
    """Part of the run's time that goes into all checkpoints."""
    streams: Literal["stored", "recomputed"]
    streams_every: int
    """Blocks between two borders at which they are stored; 0 when they are not."""
    streams_bytes: int
    """Most that stored streams take on the disk: a new pair is written before the old one goes."""
    streams_reason: str
    restart_seconds: float
    """From ``eqat resume`` until training goes on where it was, at worst."""


def recovery(
    work: Workload,
    trainings: Sequence[Training],
    seconds: Mapping[str, float],
    fits: Callable[[Recovery], bool],
) -> Recovery:
    """The checkpoints of a run whose phases take ``seconds``; ``fits`` says whether the disk has the room."""
    model = _Model(work, trainings, seconds)
    wanted, runtime, streams = work.config.runtime.streams, work.config.runtime, model.on_streams
    if wanted == "recomputed" or (wanted == "auto" and streams is None):
        set_so = "set by runtime.streams" if wanted == "recomputed" else "no block is trained"
        return model.recovery("recomputed", 0, set_so)
    if runtime.gpus > 1:
        return model.recovery("recomputed", 0, "each of several GPUs computes its share")
    blocks = work.arch.blocks
    every = model.smallest_interval(streams) if streams else blocks
    if streams is None or wanted == "stored":
        return model.recovery("stored", min(every, blocks), "set by runtime.streams")
    stored = model.recovery("stored", every, model.why_stored(every, streams))
    if every >= blocks / 2 or stored.share > runtime.checkpoint_share:
        return model.recovery("recomputed", 0, model.why_recomputed(streams))
    if not fits(stored):
        why = f"not enough disk for {size_text(stored.streams_bytes)} of streams"
        return model.recovery("recomputed", 0, why)
    return stored


def broken_promise(
    work: Workload, trainings: Sequence[Training], seconds: Mapping[str, float], found: Recovery
) -> str:
    """A warning where a kill can lose more than ``checkpoint_minutes``, with a setting that can be kept."""
    runtime = work.config.runtime
    promised = 60 * runtime.checkpoint_minutes
    if not promised or found.lost_seconds <= promised:
        return ""
    said = (
        f"a kill can lose {time_text(found.lost_seconds)} of training, more than "
        f"runtime.checkpoint_minutes = {runtime.checkpoint_minutes:g}"
    )

    def lost(**changes: float) -> float:
        changed = msgspec.structs.replace(runtime, **changes)
        config = msgspec.structs.replace(work.config, runtime=changed)
        return _Model(msgspec.structs.replace(work, config=config), trainings, seconds).lost()

    model = _Model(work, trainings, seconds)
    cost = max(map(model.snapshot_cost, model.trainings), default=0.0)
    share = math.ceil(1000 * cost / (SNAPSHOT_SHARE * PART_OF_THE_PROMISE * promised)) / 1000
    if runtime.checkpoint_share < share <= 1 and lost(checkpoint_share=share) <= promised:
        return (
            f"{said}: a checkpoint takes {time_text(cost)}, and more of them more than their share of the "
            f"time; runtime.checkpoint_share = {share:g} would keep it"
        )
    minutes = math.ceil(runtime.checkpoint_minutes)
    while (most := lost(checkpoint_minutes=minutes)) > 60 * minutes:
        minutes = math.ceil(most / 60)
    slowest = time_text(max((training.step for training in model.trainings), default=0.0))
    return (
        f"{said}: a step takes up to {slowest} and a checkpoint {time_text(found.checkpoint_seconds)} and "
        f"{time_text(found.write_seconds)} more until it counts; "
        f"runtime.checkpoint_minutes = {minutes} can be kept"
    )


class _Model:
    """The arithmetic, for one workload on one machine."""

    def __init__(self, work: Workload, trainings: Sequence[Training], seconds: Mapping[str, float]) -> None:
        self.work, self.trainings, self.seconds = work, trainings, seconds
        self.runtime: RuntimeConfig = work.config.runtime
        of_blocks = made_costs(work.config)[0].stage.name if streamed(work.config) else ""
        self.on_streams = next((training for training in trainings if training.phase == of_blocks), None)
        """The training of blocks, where streams pass through them."""

    # One write

    def copying(self, size: int) -> float:
        rate = CONSTANTS.copy_rate_cuda if self.work.cuda else CONSTANTS.copy_rate_cpu
        return size / rate

    def writing(self, size: int, files: int = FILES_OF_A_COMMIT) -> float:
        return size / CONSTANTS.write_rate + files * CONSTANTS.sync

    def in_front(self, size: int, files: int = FILES_OF_A_COMMIT) -> float:
        """Training waits for all of it."""
        return self.copying(size) + self.writing(size, files)

    # Snapshots

    def snapshot_cost(self, training: Training) -> float:
        """Seconds that training loses: a CPU does one or the other, beside a GPU the host writes for free."""
        if not self.work.cuda:
            return self.in_front(training.bytes)
        return self.copying(training.bytes)

    def interval(self, training: Training) -> float:
        """As often as promised, if that is affordable, and if the one before is written by then."""
        promised = PART_OF_THE_PROMISE * 60 * self.runtime.checkpoint_minutes
        affordable = self.snapshot_cost(training) / (SNAPSHOT_SHARE * self.runtime.checkpoint_share)
        keeps = promised and training.bytes  # what has no state in the middle begins again with the block
        return max(promised, affordable, self.writing(training.bytes)) if keeps else 0.0

    def number(self, training: Training) -> int:
        """Snapshots that come due."""
        interval = self.interval(training)
        return int((training.whole - training.border) / interval) if interval else 0

    def lost(self) -> float:
        """By a kill at the worst moment: a snapshot is due, the step before it is a long one, and it is not
        quite written. What a block's borders take comes on top; no snapshot can be taken there."""
        lost = [0.0]
        trained = {training.phase for training in self.trainings}
        for stage in (costs.stage for costs in made_costs(self.work.config)):
            if stage.name not in trained:  # what is committed together: a block, from load to commit, or all
                together = self.work.arch.blocks if stage.scope == "block" else 1
                lost.append(self.seconds.get(stage.name, 0.0) / together)
        for training in self.trainings:
            late = training.border + training.step + self.in_front(training.bytes)
            interval = self.interval(training)
            lost.append(min(training.whole, interval + late) if interval else training.whole)
        return max(lost)

    # Streams

    def pair_seconds(self) -> float:
        """Storing the streams once, and publishing that."""
        return self.in_front(streams_bytes(self.work), 4)

    def smallest_interval(self, streams: Training) -> int:
        """Blocks after which storing the streams has become affordable."""
        budget = (1 - SNAPSHOT_SHARE) * self.runtime.checkpoint_share * streams.whole
        return max(1, math.ceil(self.pair_seconds() / budget))

    def why_stored(self, every: int, streams: Training) -> str:
        blocks = "a block" if every == 1 else f"{every} blocks"
        spent = time_text(every * streams.whole)
        return f"storing takes {time_text(self.pair_seconds())}, {blocks} {spent}"

    def why_recomputed(self, streams: Training) -> str:
        again, storing = time_text(streams.passage), time_text(self.pair_seconds())
        return f"{again} a block at a restart, storing takes {storing}"

    # All of it

    def recovery(self, streams: Literal["stored", "recomputed"], every: int, reason: str) -> Recovery:
        largest = max((training.bytes for training in self.trainings), default=0)
        again = [s for name, s in self.seconds.items() if measured_stage(name) or name == "export"]
        return Recovery(
            interval_seconds=max(map(self.interval, self.trainings), default=0.0),
            snapshots={training.phase: self.number(training) for training in self.trainings},
            lost_seconds=self.lost(),
            restarted_seconds=max(again, default=0.0),
            checkpoint_bytes=largest,
            checkpoint_seconds=self.copying(largest),
            write_seconds=self.writing(largest) if largest else 0.0,
            share=self.share(every),
            streams=streams,
            streams_every=every,
            streams_bytes=stored_bytes(self.work, every),
            streams_reason=reason,
            restart_seconds=self.restart(every),
        )

    def share(self, every: int) -> float:
        """Of the run's time, into commits, snapshots and streams."""
        work, blocks = self.work, self.work.arch.blocks
        spent = 0.0
        for costs in made_costs(work.config):
            size = costs.result_bytes(work)
            if costs.stage.scope == "block":  # each by itself
                spent += blocks * self.in_front(size // blocks)
            else:
                spent += self.in_front(size, blocks + 2)
        spent += sum(t.times * self.number(t) * self.snapshot_cost(t) for t in self.trainings)
        spent += stored_pairs(work, every) * self.pair_seconds()
        if every and teacher_bytes(work):
            spent += self.in_front(teacher_bytes(work))
        return spent / (spent + sum(self.seconds.values()))

    def restart(self, every: int) -> float:
        """Importing, tokenizing and checking every object; then what only memory held."""
        work, blocks, rate = self.work, self.work.arch.blocks, CONSTANTS.verify_rate
        largest = max((training.bytes for training in self.trainings), default=0)
        checked = made_costs(work.config)[0].result_bytes(work) + 2 * largest
        again = [0.0]
        for training in self.trainings:
            if training is self.on_streams:
                read = streams_bytes(work) if stored_pairs(work, every) else 0
                passed = min(every or blocks, blocks - 1) + 1
                again.append(read / rate + passed * training.passage)
            else:
                taught = teacher_bytes(work) / rate if every else training.teacher
                again.append(training.load + (taught if training.teacher else 0.0))
        return CONSTANTS.prepare + checked / rate + max(again)
