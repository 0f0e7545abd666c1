"""What a checkpoint remembers beside tensors: the name and the type of every such value; and how its entries,
the tensors, are called.

A value decides: where in the data a training goes on, which perplexity the report shows, how many sequences
pass at a time. So each is checked when it is read, for its type and, where it counts something, for a bound
that no real run reaches: a damaged count must not become a loop or an allocation.

Some values only tell (losses, perplexities) or save time (stored streams). Without them a run does the same,
so a wrong one costs only itself; a wrong one of the others makes its generation unusable.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Annotated, Any, Literal

import msgspec

from engine.config.runtime import MOST_GPUS
from engine.config.stages import PACKED, STAGES, Stage, network_stages
from engine.run.contents import STREAM_NAMES, StreamName
from engine.run.measures import Further

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Few = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Block = Annotated[int, msgspec.Meta(ge=0, le=9999)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]

TRAINING = "training"
"""The state of a training that was interrupted: the fact, and the entry with its tensors."""
STREAMS = "streams"
"""Which activation streams lie in the cache."""
MICRO_BATCH = "block_ap_micro_batch"
"""From which block on memory sufficed for how many sequences at a time, if that is less than a batch."""


TOGETHER = "numbers_together"
"""Numbers of hidden states that pass through a block together, if more than a training's batch."""


GPUS_NOW = "gpus"
"""On how many GPUs a run goes on, where that was allowed to be another number than it was made for."""


HEAD = "head"
"""The entry of the quantized embedding and head."""


def micro_batch_fact(stage: Stage) -> str:
    """Name of how many sequences the training of a whole network takes at a time, where the plan chose it:
    remembered, so that a resumed training adds up the same sums on a machine that would choose otherwise."""
    return f"{stage.name}_micro_batch"


def done_fact(stage: Stage) -> str:
    """Name of the fact that a stage of the whole network is trained."""
    return f"{stage.name}_done"


def block_entry(index: int) -> str:
    """Name of a quantized block in the checkpoint."""
    return f"block-{index:03d}"


def stage_entry(stage: Stage, index: int) -> str:
    """Name of what a stage left of a block: of all blocks together, the tensors that it trained."""
    return f"{stage.entries}-{index:03d}"


def eval_fact(stage: str) -> str:
    """Name of what was measured of one version of the model."""
    return f"eval_{stage}"


def losses_fact(index: int) -> str:
    """Name of a block's reconstruction losses."""
    return f"losses-{index:03d}"


def halvings_fact(stream: str, rank: int = 0) -> str:
    """Name of where on its way fewer sequences of a stream passed at a time, of a rank's share of it."""
    return f"halvings-{stream}-{rank}" if rank else f"halvings-{stream}"


class Losses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``losses-NNN``: reconstruction losses of a block."""

    initial_loss: float | None = None
    final_loss: float | None = None
    val_loss: float | None = None


class Evaluated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``eval_<stage>``: what was measured of one version of the model."""

    perplexity: Annotated[float, msgspec.Meta(gt=0)] | None
    """None when it was not a finite number."""
    tokens: Count
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    accuracy: dict[str, Share] = {}
    questions: dict[str, Count] = {}
    answer_perplexity: Annotated[float, msgspec.Meta(gt=0)] | None = None
    answer_tokens: Count = 0
    nll: list[float] = []
    """Mean loss of a token in groups of windows: how far the perplexity may be off by chance."""
    further: Further | None = None
    """Other texts, and what only a comparison with full precision tells."""

    def __post_init__(self) -> None:
        if not all(
            map(
                math.isfinite,
                (self.seconds, self.perplexity or 0.0, self.answer_perplexity or 0.0, *self.nll),
            )
        ):
            raise ValueError("a number is not finite")


class Sampler(msgspec.Struct, frozen=True):
    """Position in the data (:class:`engine.data.sampler.BatchSampler`)."""

    step: Few
    count: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    epochs: Few
    seed: int
    drop_last: Literal[0, 1]
    strata: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)] = 0

    def __post_init__(self) -> None:
        if self.step > self.epochs * math.ceil(self.count / self.batch_size):
            raise ValueError("the step lies behind the last one")


class TrainingFact(
    msgspec.Struct,
    frozen=True,
    rename={"steps": "step.steps", "scaler": "step.scaler", "val_loss": "best.val_loss"},
):
    """``training``: the values of a :class:`engine.training.snapshot.Snapshot`."""

    phase: Annotated[str, msgspec.Meta(max_length=80)]
    block: Block | None
    started: bool
    epochs_done: Few
    stale: Few
    restarts: Annotated[int, msgspec.Meta(ge=0, le=100)]
    steps_done: Few
    micro_batch: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    initial_val: float | None
    noted: dict[str, float]
    sampler: Sampler
    steps: Few
    scaler: dict[str, float]
    val_loss: float | None

    def __post_init__(self) -> None:
        stage = STAGES.get(self.phase)
        if stage is None or stage.scope != ("network" if self.block is None else "block"):
            raise ValueError("the phase and the block do not fit")


class StreamsFact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``streams``: activation streams in the cache (:class:`engine.checkpoints.streams.StoredStreams`)."""

    border: Block
    shape: Annotated[list[Count], msgspec.Meta(min_length=3, max_length=3)]
    dtype: Annotated[str, msgspec.Meta(max_length=40)]
    sha256: dict[StreamName, Digest]
    bytes: Count
    seconds: Annotated[float, msgspec.Meta(ge=0)]


Halvings = list[tuple[Block, Few]]
"""``halvings-<stream>``: block and first sequence from which only half as many pass at a time."""
MicroBatches = list[tuple[Block, Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]]]
"""Block behind whose training it was noted, and the sequences at a time. Earlier versions kept only the last
number."""


def _kind_of(name: str) -> tuple[Any, bool] | None:
    """Type of the fact called ``name``, and whether the result depends on it; none for no such fact."""
    for pattern, kind, essential in _kinds(STAGES.names()):
        if pattern.fullmatch(name):
            return kind, essential
    return None


@functools.cache
def _kinds(stages: tuple[str, ...]) -> tuple[tuple[re.Pattern[str], Any, bool], ...]:
    """Pattern of the name, type, whether the result depends on it; of so many stages."""
    networks = "|".join(stage.name for stage in network_stages())
    kinds: tuple[tuple[str, Any, bool], ...] = (
        (r"losses-[0-9]{3,4}", Losses, False),
        (rf"eval_({'|'.join((*stages, PACKED))})", Evaluated, False),
        (STREAMS, StreamsFact, False),
        (TRAINING, TrainingFact, True),
        (halvings_fact(f"({STREAM_NAMES})") + "(-[1-9][0-9]{0,3})?", Halvings, True),
        (MICRO_BATCH, MicroBatches | Annotated[int, msgspec.Meta(ge=1, le=1 << 31)], True),
        (TOGETHER, Annotated[int, msgspec.Meta(ge=1, le=1 << 40)], True),
        (GPUS_NOW, Annotated[int, msgspec.Meta(ge=1, le=MOST_GPUS)], False),
        (rf"({networks})_micro_batch", Annotated[int, msgspec.Meta(ge=1, le=1 << 31)], True),
        (rf"({networks})_done", Literal[True], True),
    )
    return tuple((re.compile(pattern), kind, essential) for pattern, kind, essential in kinds)


def problem_of(name: str, value: object) -> str:
    """What is wrong with a value for being the fact called ``name``; empty where nothing is, and for a name
    that is not known here."""
    found = _kind_of(name)
    if found is None:
        return ""
    kind = found[0]
    if kind == Literal[True]:  # msgspec knows no literal truth
        return "" if value is True else "is not true"
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError) as error:
        return str(error)
    return ""


def is_known(name: str) -> bool:
    """Whether a fact of this name exists."""
    return _kind_of(name) is not None


def decides(name: str) -> bool:
    """Whether the result of a run depends on the fact, so that it cannot be left out alone."""
    found = _kind_of(name)
    return found is not None and found[1]


def micro_batch_after(value: Any) -> int | None:
    """Sequences at a time behind the last block of ``block_ap_micro_batch``; none when all of a batch."""
    if isinstance(value, list):
        return int(value[-1][1]) if value else None
    return None if value is None else int(value)
