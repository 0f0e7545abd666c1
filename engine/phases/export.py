"""The phase ``export``: write every format from the integer codes, then read it back and compare."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.data.text import corpus_name
from engine.export.gptq_v2 import export_gptq_v2
from engine.export.verify import VerifyResult, verify_gptq_v2
from engine.phases.job import Job
from engine.run import events
from engine.run.config import RuntimeConfig, equivalent_command, to_toml
from engine.run.publish import check_target, publish
from engine.setup import package_versions

# Part of the evaluation text on which exported and trained logits are compared.
VERIFY_WINDOWS, VERIFY_TOKENS = 2, 512
COPY_SILENCE = 1800
"""Seconds that copying a checkpoint to another disk may take unheard."""


def export(job: Job, copy_to: Path | None = None) -> None:
    """Write and verify every requested format; ``copy_to`` gets a copy, of several formats a folder each."""
    names = job.config.export.formats
    targets = {name: copy_to / name if len(names) > 1 else copy_to for name in names if copy_to is not None}
    for target in targets.values():
        check_target(target)
    for name in names:
        assert name == "gptq_v2", name
        path = job.run.export_dir / name
        card = _card(job)
        written = export_gptq_v2(
            path,
            job.lm,
            job.source,
            job.packed,
            shard_bytes=int(job.config.export.shard_gib * 2**30),
            card=card,
            on_block=job.report.step,
        )
        verified = _verify(job, path, card)
        if name in targets:
            job.report.expect_silence(COPY_SILENCE)
            publish(path, targets[name])
        job.report.emit(
            events.Export(
                format=name,
                path=str(path.relative_to(job.run.path)),
                verified=verified.verified,
                max_logit_diff=verified.max_logit_diff,
                bytes=written.bytes,
                fp_bytes=written.fp_bytes,
                bits_per_weight=written.bits_per_weight,
                logit_tolerance=verified.tolerance,
                perplexity=verified.perplexity_packed,
                perplexity_trained=verified.perplexity_trained,
                tokens=verified.tokens,
                copied_to=str(targets.get(name, "")),
            )
        )


def _verify(job: Job, path: Path, card: dict[str, Any]) -> VerifyResult:
    """Read the files back and compare bits and logits; an export that differs is never handed out."""
    tokens = job.tokens.evaluation if len(job.tokens.evaluation) else job.tokens.block_ap
    if not len(tokens):
        tokens = torch.arange(VERIFY_TOKENS).remainder(job.lm.vocab_size).unsqueeze(0)
    result = verify_gptq_v2(
        path,
        job.lm,
        job.packed,
        tokens[:VERIFY_WINDOWS, :VERIFY_TOKENS],
        on_block=lambda done, blocks: job.report.checkpoint_requested(),
    )
    if not result.verified:
        failed = path.with_name(f"{path.name}.failed")
        shutil.rmtree(failed, ignore_errors=True)
        path.rename(failed)
    result.raise_if_failed()
    return result


def _card(job: Job) -> dict[str, Any]:
    """What the model card says."""
    config = job.config
    evaluation = job.tokens.evaluation
    return {
        "base_model": config.model.source,
        "command": equivalent_command(config),
        "config": to_toml(msgspec.structs.replace(config, runtime=RuntimeConfig(seed=config.runtime.seed))),
        "perplexity": job.perplexities,
        "accuracy": job.accuracies,
        "versions": package_versions(),
        "evaluation": f"{corpus_name(config.evaluation.data)}, {evaluation.shape[0]} windows of "
        f"{evaluation.shape[1]} tokens",
    }
