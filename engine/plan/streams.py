"""Activation streams: those that blocks are made on, and the one that ends as a teacher.

The stage that trains blocks sends the text through the original blocks and through the quantized ones; one
that only needs what the quantized ones hand out has one stream. The full-precision stream, behind the
last block, is what a stage behind it may learn from: the last hidden states of the full-precision model on
that text.
"""

from __future__ import annotations

from engine.config.dtypes import resolved_dtype
from engine.config.run import RunConfig
from engine.config.stages import Stage, learns_answers
from engine.errors import UsageError
from engine.plan.costs import Text, costs_of, made_costs
from engine.plan.estimate import Workload


def streamed(config: RunConfig) -> Text | None:
    """The text of the streams; none where blocks are made without any."""
    blocks = made_costs(config)[0]
    return blocks.text(config)


def streams_batch(config: RunConfig) -> int:
    """Sequences of a stream that pass through a block together."""
    return made_costs(config)[0].streams_batch(config)


def taught_stage(config: RunConfig) -> Stage | None:
    """The stage that learns from a teacher; none where nothing does."""
    return next((costs.stage for costs in made_costs(config) if costs.teacher_text(config) is not None), None)


def refuse_unknown_teacher(config: RunConfig) -> None:
    """Imported blocks may be all there is of a model: then nothing can learn from the original.

    Raises:
        UsageError: names the setting that asks for it.
    """
    stage = taught_stage(config)
    if stage is not None and config.imported.lacks_original:
        raise UsageError(
            f"{stage.label} would learn from the original model, and none is named",
            where=f"{stage.name}.loss",
            hint=f"{stage.name}.loss=cross_entropy, or name the model: imported.reference (--reference)",
        )


def taught(config: RunConfig) -> Text | None:
    """The text of the teacher; none where nothing learns from one."""
    stage = taught_stage(config)
    return None if stage is None else costs_of(stage).teacher_text(config)


def streamed_stage(config: RunConfig) -> Stage:
    """The stage whose text the streams are, where :func:`streamed` says that there are any."""
    return made_costs(config)[0].stage


def may_share_teacher(config: RunConfig, *, cuda: bool) -> bool:
    """Whether the full-precision stream can be the teacher, as far as the configuration says: there are both,
    and they are computed alike. Then it is, if its text contains the teacher's."""
    full, teacher, stage = streamed(config), taught(config), taught_stage(config)
    if full is None or teacher is None or full.sequence_length != teacher.sequence_length:
        return False
    if made_costs(config)[0].streams() < 2:
        return False
    if stage is not None and learns_answers(config, stage):
        return False
    dtypes = {resolved_dtype(text.compute_dtype, cuda=cuda) for text in (full, teacher)}
    return len(dtypes) == 1


def shares_teacher(work: Workload) -> bool:
    """Whether it is, as is planned: certainly where both ask for the same sequences."""
    full, teacher = streamed(work.config), taught(work.config)
    if full is None or teacher is None or not may_share_teacher(work.config, cuda=work.cuda):
        return False
    return (full.sequences, full.val_sequences) == (teacher.sequences, teacher.val_sequences)


def stream_bytes(work: Workload) -> int:
    """One of the streams."""
    text = streamed(work.config)
    return text.stream_bytes(work) if text else 0


def streams_bytes(work: Workload) -> int:
    """All of the streams that pass through the blocks together."""
    return made_costs(work.config)[0].streams() * stream_bytes(work)


def teacher_bytes(work: Workload) -> int:
    """The teacher's last hidden states."""
    text = taught(work.config)
    return text.stream_bytes(work) if text else 0


# ------------------------------------------------------------------------------------------- on the disk


def stored_pairs(work: Workload, every: int) -> int:
    """How often the streams are stored, which are a pair or one; behind the last block nobody needs them."""
    return (work.arch.blocks - 1) // every if every and streamed(work.config) else 0


def stored_bytes(work: Workload, every: int) -> int:
    """Most that stored streams take on the disk; 0 when ``every`` is."""
    if not every:
        return 0
    pair = streams_bytes(work)
    held = min(2, stored_pairs(work, every)) * pair
    beside = pair if stored_pairs(work, every) and shares_teacher(work) else 0
    return max(held, beside + teacher_bytes(work))
