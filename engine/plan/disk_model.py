"""The disk model: what a run directory holds at the peak of each phase, files and nameless ones alike.

It follows the engine phase by phase.

    checkpoints   every finished block once; E2E-QP's scales beside them; generation files. A training's
                  snapshots: the two newest generations have one each while a third is being written
    cache         stored streams: a new pair is written before the old one goes, the last pair lies beside the
                  teacher's stream; the activation store, where it is on the disk
    export        tensors, their header, tokenizer and model card
    the rest      configuration, manifest, event log

A stop takes a snapshot wherever it comes, also where none would be due.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.architecture import headers
from engine.architecture.description import ModelDescription, resolve_source
from engine.architecture.families import Architecture
from engine.architecture.links import TOKENIZER_FILES
from engine.plan.checkpoint_sizes import block_bytes, generation_bytes, norms, scales_bytes, snapshot_bytes
from engine.plan.estimate import CONSTANTS, GIB, Constants, Store, Workload, sizes
from engine.plan.memory_model import phase_memory
from engine.plan.recovery_model import Recovery, stored_pairs, teacher_file

BYTE_TOKENIZER = 13 << 10
"""The tokenizer of a random model."""
SUFFIXES = ("weight", "qweight", "qzeros", "scales", "g_idx", "bias")
"""What may be the name of a linear's tensor in an export; it reserves room for all of them."""


def disk_peaks(
    work: Workload,
    store: Store,
    recovery: Recovery,
    seconds: Mapping[str, float],
    assets: int,
    *,
    stopped: bool,
    constants: Constants = CONSTANTS,
) -> dict[str, int]:
    """Bytes at the peak of each phase, ``stopped`` at its worst moment or run through.

    ``assets`` is what an export has besides its tensors.
    """
    least = 1 if stopped else 0
    snapshots = {phase: max(least, min(3, number)) for phase, number in recovery.snapshots.items()}
    peaks: dict[str, int] = {}
    log = float(constants.events_per_block * work.arch.blocks)
    for phase in work.phases():
        log += constants.events_rate * seconds[phase] if phase != "prepare" else 0.0
        files = constants.run_files + int(log) + 3 * generation_bytes(work.arch, constants)
        nameless = phase_memory(work, phase).stored if store == "disk" else 0
        peaks[phase] = files + nameless + _kept(work, phase, recovery.streams_every, snapshots, assets)
    return peaks


def _kept(work: Workload, phase: str, every: int, snapshots: Mapping[str, int], assets: int) -> int:
    """Checkpoints, streams stored at every ``every``-th border, and the export."""
    arch, config = work.arch, work.config
    blocks = arch.blocks * block_bytes(arch, config.grid)
    scales = arch.blocks * scales_bytes(arch, config.grid) if config.e2e_qp.enabled else 0
    teacher = teacher_file(work) if every else 0
    if phase == "rtn":
        return blocks
    if phase == "block_ap":
        return max(_block_ap(work, every, snapshots[phase]))
    if phase in ("evaluate_rtn", "evaluate_block_ap"):
        return blocks + (teacher if work.shares_teacher else 0)
    if phase == "e2e_qp":
        return blocks + teacher + max(snapshots[phase] * snapshot_bytes(work, phase), scales)
    if phase == "evaluate_e2e_qp":
        return blocks + scales
    if phase == "export":
        return blocks + scales + _last_snapshot(work, snapshots) + export_bytes(work) + assets
    return 0


def _block_ap(work: Workload, every: int, snapshots: int) -> Iterator[int]:
    """Its peak is one of these moments."""
    arch, one = work.arch, block_bytes(work.arch, work.config.grid)
    pairs, pair = stored_pairs(work, every), 2 * work.stream_bytes()
    snapshot = snapshot_bytes(work, "block_ap")
    held = min(1, pairs) * pair
    # The last block is trained, and committed: then the older generation still has its last snapshot.
    yield (arch.blocks - 1) * one + held + snapshots * snapshot
    yield arch.blocks * one + held + min(2, snapshots) * snapshot
    if pairs:  # the streams are stored for the last time
        yield pairs * every * one + min(2, pairs) * pair + min(1, snapshots) * snapshot
    if every and work.shares_teacher:
        yield arch.blocks * one + held + teacher_file(work) + min(1, snapshots) * snapshot


def _last_snapshot(work: Workload, snapshots: Mapping[str, int]) -> int:
    """The older of two generations still has the last training's snapshot, unless an evaluation was committed
    since."""
    last = "e2e_qp" if work.config.e2e_qp.enabled else "block_ap"
    left = snapshots.get(last, 0) and not work.config.evaluation.enabled
    return snapshot_bytes(work, last) if left else 0


# --------------------------------------------------------------------------------------------- export


def export_bytes(work: Workload) -> int:
    """The tensors of every format and the headers of their files."""
    size = sizes(work.arch, work.config.grid).export
    shards = 1 + int(size / (work.config.export.shard_gib * GIB))
    return len(work.config.export.formats) * (size + shards * header_room(work.arch))


def header_room(arch: Architecture) -> int:
    """What each file reserves for its header, and the eight bytes before it."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for index in range(arch.blocks):
        prefix = f"{arch.block_prefix}.{index}"
        names += [f"{prefix}.{name}.weight" for name, _ in norms(arch)]
        for linear in arch.linears:
            names += [f"{prefix}.{linear.name}.{suffix}" for suffix in SUFFIXES]
            names += [f"{prefix}.{linear.name}.bias"] if linear.bias else []
    return 8 + headers.header_room(names)


def assets_bytes(model: ModelDescription, constants: Constants = CONSTANTS) -> int:
    """What an export has besides its tensors: model card, configuration, tokenizer."""
    path = resolve_source(model.source)
    if model.kind == "random":
        tokenizer = BYTE_TOKENIZER
    elif isinstance(path, Path) and path.is_dir():
        files = [path / name for name in TOKENIZER_FILES]
        tokenizer = sum(file.stat().st_size for file in files if file.is_file())
    else:
        tokenizer = constants.tokenizer_entry * model.architecture.vocab
    return constants.export_texts + tokenizer
