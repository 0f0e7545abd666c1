"""What a run is made from: written down once, compared when it goes on, shared with a run that redoes a part.

A checkpoint belongs to one model, one text and one set of deciding settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.checkpoints.identity import counts_as, differing_field
from engine.checkpoints.store import CheckpointStore
from engine.config.calibration import text_words
from engine.config.corpora import corpus_name
from engine.config.learning import learned_words
from engine.config.run import RunConfig
from engine.config.sameness import config_hash, equivalent_command
from engine.config.stages import STAGES
from engine.config.writing import to_dict
from engine.data.encoding import Encoder
from engine.errors import IdentityError, PreflightError
from engine.models.source import ModelSource
from engine.process import device_name, package_versions
from engine.reporter import Reporter
from engine.run.directory import RunDirectory
from engine.run.facts import block_entry, eval_fact, losses_fact
from engine.run.objects import DamagedCheckpoint
from engine.run.redo import read_origin
from engine.run.salvage import blocks_of, leading_blocks
from engine.run.usable import most_blocks

DECIDING_PACKAGES = ("torch", "transformers")
"""Other versions of these compute other last bits."""


def write_manifest(
    run: RunDirectory,
    config: RunConfig,
    source: ModelSource,
    encoder: Encoder,
    device: torch.device,
    made_from: Mapping[str, str],
) -> None:
    """``run.json``: what this run was made from. Written by the first attempt that gets this far."""
    if run.run_json.exists():
        return
    further = config.evaluation.text_names()[1:]
    run.write_manifest(
        {
            "schema": 1,
            "id": run.id,
            "command": equivalent_command(config),
            "config": to_dict(config),
            "identity": {"config": config_hash(config), **made_from},
            "model": source.identity(),
            "data": {
                "calibration": learned_words(config) or text_words(config.data),
                "evaluation": corpus_name(config.evaluation.data),
                **({"further evaluation": further} if further else {}),
                "begin": encoder.words(),
            },
            "versions": package_versions(),
            "device": device_name(device),
        }
    )


def warn_of_changes(run: RunDirectory, device: torch.device, report: Reporter) -> None:
    """Say when a run goes on elsewhere than it began: correct, but no longer the same to the last bit."""
    manifest = run.manifest() or {}
    versions = package_versions()
    before = {"device": manifest.get("device"), **manifest.get("versions", {})}
    now = {"device": device_name(device), **{name: versions.get(name) for name in DECIDING_PACKAGES}}
    changed = [
        f"{name} {before[name]} → {now[name]}" for name in now if before.get(name) not in (None, now[name])
    ]
    if changed:
        report.warning(
            "changed",
            f"the run goes on with another {', another '.join(changed)}: "
            "the result will not be the same to the last bit as without the interruption",
        )


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def share_origin(run: RunDirectory, store: CheckpointStore, report: Reporter) -> None:
    """A run that redoes another from some block on begins with what that one has before it.

    Raises:
        IdentityError: when the model or the grid is another than that of the blocks.
        PreflightError: when the other run is gone, or has not all of those blocks intact.
    """
    origin = read_origin(run)
    if origin is None or store.generation:
        return
    place = RunDirectory(Path(origin.path)).checkpoints_dir
    found = most_blocks(place, origin.from_block)
    blocks = leading_blocks(found.generation.entries)
    if not 0 <= origin.from_block <= blocks:
        raise PreflightError(
            f"blocks before {origin.from_block} cannot be shared: {_intact_words(blocks)}"
            + (f" ({found.damage})" if found.damage else ""),
            where=origin.path,
            hint=f"eqat resume {origin.id} trains the rest"
            + (f", or --from-block {blocks} shares what there is" if blocks else ""),
        )
    there = found.generation
    if origin.from_block:
        _must_agree(there.identity, store, ("model", "grid."), origin.id)
    shared = [index for index in blocks_of(there.entries) if index < origin.from_block]
    names = {name(index) for index in shared for name in (block_entry, losses_fact)}
    for stage in STAGES:
        # What a method trained is measured anew; the baselines follow from the model, and from the grid.
        fields = ("model", "reference", "evaluation", *(() if stage.scope == "nothing" else ("grid.",)))
        same = differing_field(there.identity, store.identity, store.defaults, beginning=fields) is None
        if stage.baseline and same:
            names.add(eval_fact(stage.name))
    try:
        store.adopt(place, there, names.__contains__)
    except (OSError, DamagedCheckpoint) as error:
        raise PreflightError(f"blocks cannot be shared: {error}", where=origin.path) from error
    store.commit()


def _intact_words(blocks: int) -> str:
    if blocks <= 1:
        return (
            "only block 0 of it is finished and intact" if blocks else "no block of it is finished and intact"
        )
    return f"only blocks 0 to {blocks - 1} of it are finished and intact"


def _must_agree(
    there: Mapping[str, str], store: CheckpointStore, fields: tuple[str, ...], run_id: str
) -> None:
    here = dict(sorted(store.identity.items()))
    name = differing_field(there, here, store.defaults, beginning=fields)
    if name is not None:
        raise IdentityError(
            f"the blocks of {run_id} were made with {counts_as(there, name, store.defaults)}, "
            f"this run has {counts_as(here, name, store.defaults)}",
            where=name,
            hint="blocks can be shared only between runs of one model on one grid; start a new run",
        )
