"""Before anything is trained: the text as tokens, and what the run is made from.

A checkpoint belongs to one model, one text and one set of deciding settings; their names and digests are
computed here, so that a resumed run can be refused with the name of what changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.data.text import Part, corpus_name
from engine.data.tokens import token_windows
from engine.models.source import ModelSource
from engine.reporter import Reporter
from engine.run.config import DataConfig, RunConfig, config_hash, equivalent_command, to_dict
from engine.run.directory import RunDirectory
from engine.setup import device_name, package_versions

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

    def digest(self) -> str:
        """SHA-256 of everything that is read."""
        digest = hashlib.sha256()
        for tokens in (self.block_ap, self.e2e_qp, self.evaluation):
            digest.update(f"{tuple(tokens.shape)};".encode())
            digest.update(tokens.to(torch.int32).contiguous().numpy().data)
        return digest.hexdigest()


def draw_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: Reporter) -> Tokens:
    """Token windows for both trainings and the evaluation; a phase that is off gets none.

    Raises:
        DataError: for text that is missing, empty, too short or of the wrong form.
    """

    def draw(data: DataConfig, part: Part, sequences: int, length: int) -> Tensor:
        report.checkpoint_requested()
        report.expect_silence(PREPARE_SILENCE)
        return token_windows(
            tokenizer,
            data,
            part,
            sequences=sequences,
            length=length,
            seed=config.runtime.seed,
            warn=report.warning,
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
    run: RunDirectory, config: RunConfig, source: ModelSource, device: torch.device, data: str
) -> None:
    """``run.json``: what this run was made from. Written by the first attempt that gets this far."""
    if run.run_json.exists():
        return
    identity = source.identity()
    run.write_manifest(
        {
            "schema": 1,
            "id": run.id,
            "command": equivalent_command(config),
            "config": to_dict(config),
            "identity": {"config": config_hash(config), "model": digest(identity), "data": data},
            "model": identity,
            "data": {
                "calibration": corpus_name(config.data),
                "evaluation": corpus_name(config.evaluation.data),
            },
            "versions": package_versions(),
            "device": device_name(device),
        }
    )


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def deciding_fields(config: RunConfig) -> dict[str, str]:
    """The settings a checkpoint depends on, by name; what is exported and where it runs are none of them."""

    def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", json.dumps(value)

    tree = to_dict(config)
    for name in ("name", "description", "export"):
        del tree[name]
    tree["runtime"] = {"seed": config.runtime.seed}
    return dict(flat(tree))
