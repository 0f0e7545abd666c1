"""The disk model: what a run directory holds at the peak of each phase, files and nameless ones alike.

What a stage keeps while it is made is said in its file (:mod:`engine.plan.stages`).

    checkpoints   every finished block once; what trainings of the whole network add beside them; generation
                  files. A training's snapshots: the two newest generations have one each while a third is
                  being written
    cache         stored streams: a new pair is written before the old one goes, the last pair lies beside the
                  teacher's stream; the activation store, where it is on the disk
    export        tensors, their header, tokenizer and model card
    the rest      configuration, manifest, event log

A stop takes a snapshot wherever it comes, also where none would be due.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.architecture import headers
from engine.architecture.description import ModelDescription, resolve_source
from engine.architecture.families import Architecture
from engine.architecture.model_folder import copied_bytes
from engine.config.formats import FORMATS
from engine.config.runtime import StoreKind
from engine.config.stages import STAGES, last_stage, measured_stage
from engine.plan.costs import costs_of
from engine.plan.estimate import CONSTANTS, GIB, Workload
from engine.plan.export_sizes import exported_bytes, number_bytes
from engine.plan.memory_model import phase_memory
from engine.plan.object_sizes import HEADS, generation_bytes, head_bytes, norms
from engine.plan.own_text import own_text_bytes
from engine.plan.recovery_model import Recovery
from engine.plan.streams import shares_teacher, teacher_bytes

BYTE_TOKENIZER = 13 << 10
"""The tokenizer of a random model."""


def disk_peaks(
    work: Workload,
    store: StoreKind,
    recovery: Recovery,
    seconds: Mapping[str, float],
    assets: int,
    *,
    stopped: bool,
) -> dict[str, int]:
    """Bytes at the peak of each phase, ``stopped`` at its worst moment or run through.

    ``assets`` is what an export has besides its tensors.
    """
    least = 1 if stopped else 0
    snapshots = {phase: max(least, min(3, number)) for phase, number in recovery.snapshots.items()}
    peaks: dict[str, int] = {}
    log = float(CONSTANTS.events_per_block * work.arch.blocks)
    for phase, kept in _kept(work, recovery.streams_every, snapshots, assets).items():
        log += CONSTANTS.events_rate * seconds[phase] if phase != "prepare" else 0.0
        files = CONSTANTS.run_files + own_text_bytes(work.asked) + int(log) + 3 * generation_bytes(work.arch)
        memory = phase_memory(work, phase)
        nameless = memory.processes * memory.stored if store == "disk" else 0
        peaks[phase] = files + nameless + kept
    return peaks


def _kept(work: Workload, every: int, snapshots: Mapping[str, int], assets: int) -> dict[str, int]:
    """By phase: checkpoints, streams stored at every ``every``-th border, and the export."""
    finished = head_bytes(work.arch, work.config.grid)
    kept: dict[str, int] = {}
    for phase in work.phases():
        kept[phase] = finished
        measured = measured_stage(phase)
        if phase in STAGES:
            costs = costs_of(STAGES[phase])
            kept[phase] += costs.kept(work, every, snapshots.get(phase, 0))
            finished += costs.result_bytes(work)
        elif measured and STAGES[measured].scope == "block" and every and shares_teacher(work):
            kept[phase] += teacher_bytes(work)
        elif phase == "export":
            kept[phase] += _last_snapshot(work, snapshots) + export_bytes(work) + assets
    return kept


def _last_snapshot(work: Workload, snapshots: Mapping[str, int]) -> int:
    """The older of two generations still has the last training's snapshot, unless an evaluation was committed
    since."""
    last = last_stage(work.config)
    left = snapshots.get(last.name, 0) and not work.config.evaluation.enabled
    return costs_of(last).snapshot_bytes(work) if left else 0


# --------------------------------------------------------------------------------------------- export


def export_bytes(work: Workload) -> int:
    """The tensors of every format, the headers of their files, and what these say of the network."""
    config = work.config
    total = 0
    for name in config.export.formats:
        size = exported_bytes(work.arch, config.grid, name, number_bytes(config.export.dtype))
        shards = 1 + int(size / (config.export.shard_gib * GIB))
        total += size + shards * header_room(work.arch, name, heads=config.grid.head is not None)
        total += work.arch.blocks * FORMATS[name].network_bytes
    return total


def header_room(arch: Architecture, form: str, *, heads: bool = False) -> int:
    """What each file of an export in a format reserves for its header and the eight bytes before it:
    room for every name that a linear's tensors may have; ``heads`` that embedding and head are quantized."""
    tensors = ("weight", *FORMATS[form].tensors, "bias")
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    if heads:
        names += [f"{head}.{tensor}" for head in HEADS for tensor in FORMATS[form].tensors]
    for index in range(arch.blocks):
        prefix = f"{arch.block_prefix}.{index}"
        names += [f"{prefix}.{name}.weight" for name, _ in norms(arch)]
        for linear in arch.linears:
            names += [f"{prefix}.{linear.name}.{tensor}" for tensor in tensors]
            names += [f"{prefix}.{linear.name}.bias"] if linear.bias else []
    names += [name for name, _ in arch.carried for _ in range(2)]  # as the export counts them
    return 8 + headers.header_room(names)


def assets_bytes(model: ModelDescription) -> int:
    """What an export has besides its tensors: model card, configuration, tokenizer."""
    path = resolve_source(model.source)
    if model.kind == "random":
        tokenizer = BYTE_TOKENIZER
    elif isinstance(path, Path) and path.is_dir():
        tokenizer = copied_bytes(path)
    else:
        tokenizer = CONSTANTS.tokenizer_entry * model.architecture.vocab
    return CONSTANTS.export_texts + tokenizer
