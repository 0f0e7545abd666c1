"""What is left of a generation when some of its objects are damaged: it without them, and without whatever
was made from them.

    Block-AP's block K   from all blocks before it, whose outputs it was trained on
    a rounded block      from the model alone
    the state of a training   from the blocks before it; of the end-to-end training from all of them
    scales, e2e_qp_done  from all blocks, and from each other
    stored streams       from the blocks they have passed
    eval_block_ap, eval_e2e_qp   from what they measured; eval_fp and eval_rtn from the model alone
    halvings             from nothing: each says where it begins, so those of later blocks change nothing
                         before, and with them the streams pass the later blocks as they did

Pure functions, no disk: :mod:`engine.run.usable` finds out what is damaged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.run import facts as known
from engine.run.facts import block_entry, losses_fact, scales_entry
from engine.run.generations import Generation


@dataclass(frozen=True)
class Salvaged:
    """What can be continued from, and what that costs."""

    generation: Generation
    lost: str
    """What has to be done again, in words; empty when nothing was lost."""


def blocks_of(entries: Collection[str], kind: str = "block") -> list[int]:
    """Indices of the blocks that a generation holds something of, in order."""
    names = (re.fullmatch(rf"{kind}-([0-9]{{3,4}})", name) for name in entries)
    return sorted(int(match[1]) for match in names if match)


def leading_blocks(entries: Collection[str]) -> int:
    """How many blocks there are without a gap, from the first on."""
    found = blocks_of(entries)
    return next((count for count, index in enumerate(found) if count != index), len(found))


def is_chained(identity: Mapping[str, str]) -> bool:
    """Whether each block was trained behind the quantized blocks before it (Block-AP), not only rounded."""
    return identity.get("block_ap.enabled") != "false"


def salvage(found: Generation, damaged: Collection[str], chained: bool) -> Salvaged:
    """``found`` without the entries in ``damaged`` and without what depends on them.

    ``chained`` blocks depend on those before them (:func:`is_chained`).
    """
    if not damaged:
        return Salvaged(found, "")
    entries, facts = dict(found.entries), dict(found.facts)
    for name in damaged:
        entries.pop(name, None)
    gone = [index for index in blocks_of(found.entries) if block_entry(index) not in entries]
    if gone and chained:
        gone = [index for index in blocks_of(found.entries) if index >= gone[0]]
    for index in gone:
        entries.pop(block_entry(index), None)
        facts.pop(losses_fact(index), None)
    if gone:
        facts.pop("eval_block_ap", None)
        _cut_streams(facts, gone[0])
        _cut_micro_batches(facts, gone[0])
    if gone or any(name.startswith("scales-") for name in damaged):
        for index in blocks_of(found.entries, "scales"):
            entries.pop(scales_entry(index), None)
        facts.pop(known.E2E_DONE, None)
        facts.pop("eval_e2e_qp", None)
    if known.TRAINING not in entries or _is_behind(facts, gone):
        entries.pop(known.TRAINING, None)
        facts.pop(known.TRAINING, None)
    kept = replace(found, entries=entries, facts=facts)
    return Salvaged(kept, _words(found, kept, gone))


def _cut_streams(facts: dict[str, Any], block: int) -> None:
    """Streams that have passed ``block``, as it no longer is, are of no use."""
    if known.STREAMS in facts and facts[known.STREAMS]["border"] > block:
        del facts[known.STREAMS]


def _cut_micro_batches(facts: dict[str, Any], block: int) -> None:
    """Memory was short while ``block`` or a later one was trained: it begins again as it began."""
    value = facts.get(known.MICRO_BATCH)
    if isinstance(value, list):
        facts[known.MICRO_BATCH] = [entry for entry in value if entry[0] < block]
        if not facts[known.MICRO_BATCH]:
            del facts[known.MICRO_BATCH]


def _is_behind(facts: Mapping[str, Any], gone: list[int]) -> bool:
    """Whether the training that was interrupted came after a block that is gone."""
    training = facts.get(known.TRAINING)
    if training is None or not gone:
        return False
    return training["block"] is None or training["block"] > gone[0]


def _words(found: Generation, kept: Generation, gone: list[int]) -> str:
    """What is to be done again."""
    parts = []
    if gone:
        parts.append(_blocks_words(gone))
    if known.E2E_DONE in found.facts and known.E2E_DONE not in kept.facts:
        parts.append("the end-to-end training")
    training = found.facts.get(known.TRAINING)
    if training is not None and known.TRAINING not in kept.facts:
        parts.append(f"what was trained of {_what_trains(training)} so far")
    if not parts:
        return "nothing that is needed"
    return " and ".join(parts)


def _blocks_words(gone: list[int]) -> str:
    if len(gone) == 1:
        return f"block {gone[0]}"
    if gone == list(range(gone[0], gone[-1] + 1)):
        return f"blocks {gone[0]} to {gone[-1]}"
    return f"blocks {', '.join(map(str, gone))}"


def _what_trains(training: Mapping[str, Any]) -> str:
    """Which training an interrupted state belongs to."""
    return "the end-to-end training" if training["block"] is None else f"block {training['block']}"


def _finished(kept: Generation) -> int:
    """How many blocks need not be trained again."""
    return leading_blocks(kept.entries) if is_chained(kept.identity) else len(blocks_of(kept.entries))


def held(kept: Generation) -> str:
    """What a run that goes on from ``kept`` has, in words."""
    if kept.facts.get(known.E2E_DONE):
        return "all that was trained"
    blocks = _finished(kept)
    parts = [f"{blocks} finished block{'s' * (blocks != 1)}" if blocks else "no finished block"]
    training = kept.facts.get(known.TRAINING)
    if training is not None:
        parts.append(f"{_what_trains(training)} up to step {training['sampler']['step']}")
    return " and ".join(parts)


def progress(kept: Generation) -> tuple[int, ...]:
    """How far a run is that goes on from ``kept``; the larger, the less is left to do."""
    training = kept.facts.get(known.TRAINING) or {}
    blocks = _finished(kept)
    end_to_end = bool(training) and training["block"] is None
    evaluated = sum(name.startswith("eval_") for name in kept.facts)
    streams = kept.facts.get(known.STREAMS) or {"border": 0}
    return (
        known.E2E_DONE in kept.facts,
        blocks,
        end_to_end,
        training.get("steps_done", -1),
        training.get("epochs_done", -1),
        evaluated,
        streams["border"],
    )
