"""What is left of a generation when some of its objects are damaged: it without them, and without whatever
was made from them.

    a trained block K    from all blocks before it, whose outputs it was trained on
    a rounded block      from the model alone
    the state of a training   from the blocks before it; of the end-to-end training from all of them
    what a stage of the whole network trained, that it is done   from all blocks, from each other, and from
                         what the stages before it trained
    stored streams       from the blocks they have passed
    an evaluation        from what it measured; of full precision and of plain rounding from the model alone
    halvings             from nothing: each says where it begins, so those of later blocks change nothing
                         before, and with them the streams pass the later blocks as they did

Pure functions, no disk: :mod:`engine.run.usable` finds out what is damaged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.config.run import run_config
from engine.config.stages import STAGES, network_stages
from engine.run import facts as known_facts
from engine.run.facts import block_entry, eval_fact, losses_fact
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
    """Whether each block was trained behind the quantized blocks before it (Block-AP), not only rounded.

    What a method does that is not known here nobody can say: then blocks are taken for chained.
    """
    methods = {stage.name for stage in STAGES if stage.scope == "block" and not stage.baseline}
    switches = {name.removesuffix(".enabled") for name in identity if name.endswith(".enabled")}
    strange = switches - {*STAGES.names(), "evaluation"}
    return any(_is_on(identity, name) for name in methods | strange)


def _is_on(identity: Mapping[str, str], name: str) -> bool:
    """Whether the section called ``name`` was enabled; where nothing is written of it, its default counts."""
    section = getattr(run_config()(), name, None)
    default = "true" if section is not None and section.enabled else "false"
    return identity.get(f"{name}.enabled", default) != "false"


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
        for stage in STAGES:
            if stage.scope == "block" and not stage.baseline:
                facts.pop(eval_fact(stage.name), None)
        _cut_streams(facts, gone[0])
        _cut_micro_batches(facts, gone[0])
    cut = _cut_networks(entries, facts, damaged, all_of_them=bool(gone))
    if known_facts.TRAINING not in entries or _is_behind(facts, gone, cut):
        entries.pop(known_facts.TRAINING, None)
        facts.pop(known_facts.TRAINING, None)
    kept = replace(found, entries=entries, facts=facts)
    return Salvaged(kept, _words(found, kept, gone))


def _cut_networks(
    entries: dict[str, Any], facts: dict[str, Any], damaged: Collection[str], *, all_of_them: bool
) -> bool:
    """What stages of the whole network trained goes, from the first on of which something is damaged; whether
    anything of them went."""
    stages = network_stages()
    prefixes = [stage.entries for stage in stages]
    prefixes += sorted(_prefixes(entries) - {*prefixes, "block"})  # of a stage that is not known here
    of_damaged = _prefixes(damaged)
    first = next((at for at, prefix in enumerate(prefixes) if all_of_them or prefix in of_damaged), None)
    if first is None:
        return False
    for name in [name for name in entries if _prefix(name) in prefixes[first:]]:
        del entries[name]
    for name in [stage.name for stage in stages[first:]] + prefixes[max(first, len(stages)) :]:
        facts.pop(f"{name}_done", None)
        facts.pop(eval_fact(name), None)
    return True


def _prefix(entry: str) -> str:
    """What stands before the number of a block in the name of an entry; empty for one without."""
    match = re.fullmatch(r"(.+)-[0-9]{3,4}", entry)
    return match[1] if match else ""


def _prefixes(entries: Collection[str]) -> set[str]:
    return {_prefix(name) for name in entries} - {""}


def _trained_networks(facts: Mapping[str, Any]) -> int:
    """How many stages of the whole network are trained."""
    return sum(bool(facts.get(name)) for name in facts if name.endswith("_done"))


def _cut_streams(facts: dict[str, Any], block: int) -> None:
    """Streams that have passed ``block``, as it no longer is, are of no use."""
    if known_facts.STREAMS in facts and facts[known_facts.STREAMS]["border"] > block:
        del facts[known_facts.STREAMS]


def _cut_micro_batches(facts: dict[str, Any], block: int) -> None:
    """Memory was short while ``block`` or a later one was trained: it begins again as it began."""
    value = facts.get(known_facts.MICRO_BATCH)
    if isinstance(value, list):
        facts[known_facts.MICRO_BATCH] = [entry for entry in value if entry[0] < block]
        if not facts[known_facts.MICRO_BATCH]:
            del facts[known_facts.MICRO_BATCH]


def _is_behind(facts: Mapping[str, Any], gone: list[int], cut: bool) -> bool:
    """Whether the training that was interrupted came after a block that is gone, or after a training of the
    whole network that was ``cut``."""
    training = facts.get(known_facts.TRAINING)
    if training is None or not (gone or cut):
        return False
    return training["block"] is None or (bool(gone) and training["block"] > gone[0])


def _words(found: Generation, kept: Generation, gone: list[int]) -> str:
    """What is to be done again."""
    parts = []
    if gone:
        parts.append(_blocks_words(gone))
    if _trained_networks(kept.facts) < _trained_networks(found.facts):
        parts.append("the end-to-end training")
    training = found.facts.get(known_facts.TRAINING)
    if training is not None and known_facts.TRAINING not in kept.facts:
        parts.append(f"what was trained of {_what_trains(training)} so far")
    if known_facts.HEAD in found.entries and known_facts.HEAD not in kept.entries:
        parts.append("the rounding of embedding and head")
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
    if _trained_networks(kept.facts):
        return "all that was trained"
    blocks = _finished(kept)
    parts = [f"{blocks} finished block{'s' * (blocks != 1)}" if blocks else "no finished block"]
    training = kept.facts.get(known_facts.TRAINING)
    if training is not None:
        parts.append(f"{_what_trains(training)} up to step {training['sampler']['step']}")
    return " and ".join(parts)


def progress(kept: Generation) -> tuple[int, ...]:
    """How far a run is that goes on from ``kept``; the larger, the less is left to do."""
    training = kept.facts.get(known_facts.TRAINING) or {}
    blocks = _finished(kept)
    end_to_end = bool(training) and training["block"] is None
    evaluated = sum(name.startswith("eval_") for name in kept.facts)
    streams = kept.facts.get(known_facts.STREAMS) or {"border": 0}
    return (
        _trained_networks(kept.facts),
        blocks,
        end_to_end,
        training.get("steps_done", -1),
        training.get("epochs_done", -1),
        evaluated,
        streams["border"],
    )
