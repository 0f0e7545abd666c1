"""Before anything is trained: the text as tokens, and what the run is made from.

A checkpoint belongs to one model, one text and one set of deciding settings; their names and digests are
computed here, so that a resumed run can be refused with the name of what changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.checkpoints.identity import counts_as, differing_field
from engine.checkpoints.store import CheckpointStore
from engine.config.corpora import corpus_name
from engine.config.data import DataConfig
from engine.config.run import RunConfig
from engine.config.sameness import config_hash, equivalent_command
from engine.config.writing import to_dict
from engine.data.parts import Part
from engine.data.tokens import token_windows, tokenizer_hash
from engine.errors import IdentityError, PreflightError
from engine.models.source import ModelSource
from engine.process import device_name, package_versions
from engine.reporter import Reporter
from engine.run.directory import RunDirectory
from engine.run.facts import block_entry, losses_fact
from engine.run.objects import DamagedCheckpoint
from engine.run.redo import read_origin
from engine.run.salvage import blocks_of, leading_blocks
from engine.run.usable import most_blocks

DECIDING_PACKAGES = ("torch", "transformers")
"""Other versions of these compute other last bits."""
PREPARE_SILENCE = 600
"""Seconds that a download, a long text to tokenize, or the check of a large checkpoint may take unheard."""


@dataclass
class Tokens:
    """Token windows of every use, int ``[N, T]``."""

    block_ap: Tensor
    block_ap_train: int
    e2e_qp: Tensor
    e2e_qp_train: int
    evaluation: Tensor

    def digests(self) -> dict[str, str]:
        """SHA-256 of the text that is trained on (``data``) and of the text that is evaluated."""
        return {
            "data": _token_digest(self.block_ap, self.e2e_qp),
            "evaluation text": _token_digest(self.evaluation),
        }


def _token_digest(*windows: Tensor) -> str:
    digest = hashlib.sha256()
    for tokens in windows:
        digest.update(f"{tuple(tokens.shape)};".encode())
        digest.update(tokens.to(torch.int32).contiguous().numpy().data)
    return digest.hexdigest()


def draw_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: Reporter) -> Tokens:
    """Token windows for both trainings and the evaluation; a phase that is off gets none.

    Raises:
        DataError: for text that is missing, empty, too short or of the wrong form.
    """

    rules = tokenizer_hash(tokenizer)

    def draw(data: DataConfig, part: Part, sequences: int, length: int) -> Tensor:
        report.leave_if_asked()
        report.expect_silence(PREPARE_SILENCE)
        return token_windows(
            tokenizer,
            data,
            part,
            sequences=sequences,
            length=length,
            seed=config.runtime.seed,
            warn=report.warning,
            rules=rules,
        )

    def both(section: Any) -> Tensor:
        length = section.sequence_length
        parts = [torch.zeros((0, length), dtype=torch.long)]
        if section.enabled:
            parts.append(draw(config.data, "train", section.sequences, length))
            if section.val_sequences:
                parts.append(draw(config.data, "validation", section.val_sequences, length))
        return torch.cat(parts)

    # Both trainings draw before the evaluation does: an empty or unfit calibration text is named first.
    block_ap, e2e_qp = both(config.block_ap), both(config.e2e_qp)
    section = config.evaluation
    evaluation = torch.zeros((0, section.sequence_length), dtype=torch.long)
    if section.enabled:
        evaluation = draw(section.data, "evaluation", section.windows, section.sequence_length)
    return Tokens(block_ap, config.block_ap.sequences, e2e_qp, config.e2e_qp.sequences, evaluation)


def write_manifest(
    run: RunDirectory,
    config: RunConfig,
    source: ModelSource,
    device: torch.device,
    made_from: Mapping[str, str],
) -> None:
    """``run.json``: what this run was made from. Written by the first attempt that gets this far."""
    if run.run_json.exists():
        return
    run.write_manifest(
        {
            "schema": 1,
            "id": run.id,
            "command": equivalent_command(config),
            "config": to_dict(config),
            "identity": {"config": config_hash(config), **made_from},
            "model": source.identity(),
            "data": {
                "calibration": corpus_name(config.data),
                "evaluation": corpus_name(config.evaluation.data),
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
    for stage, fields in (("fp", ("model", "evaluation")), ("rtn", ("model", "evaluation", "grid."))):
        if differing_field(there.identity, store.identity, store.defaults, beginning=fields) is None:
            names.add(f"eval_{stage}")
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
