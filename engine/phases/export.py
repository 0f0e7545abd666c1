"""The phase ``export``: write every format from the integer codes, read it back and compare, publish it.

An older export keeps its name until the new one is verified. A full disk is waited for, but not another one
that the user wants a copy on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.config.calibration import mixture
from engine.config.corpora import corpus_name
from engine.config.formats import FORMATS
from engine.config.learning import learned_words
from engine.config.runtime import RuntimeConfig
from engine.config.sameness import equivalent_command
from engine.config.stages import STAGES
from engine.config.writing import to_toml
from engine.export.checkpoint import Export, add_to_card, room_beside_tensors
from engine.export.layout import DoesNotFit, Form, form_of
from engine.export.place import ExportPlace
from engine.export.result import ExportResult
from engine.export.verify import TrainedOnce, VerifyResult, verify
from engine.phases.copies import COPY_SILENCE, hear, require_same, targets_of
from engine.phases.evaluation import doubted, further_of
from engine.phases.job import Job
from engine.plan.phases import VERIFY_TOKENS, VERIFY_WINDOWS
from engine.process import package_versions
from engine.run import events
from engine.run.directory import RunDirectory
from engine.system.copying import check_target, copy_whole
from engine.system.sums import digests

BEGIN_SILENCE = 600
"""Seconds before the first block is written: some formats trace the network first."""
OTHER_DTYPE_HINT = "export.dtype takes bfloat16, float16 and float32"


def recover_exports(run: RunDirectory) -> None:
    """What a kill left of exports is mended before anything else is done with the run."""
    for row in FORMATS:
        ExportPlace(run.export_dir / row.name, run.path).recover()


def export(job: Job, copy_to: Path | None = None) -> None:
    """Write and verify every requested format; ``copy_to`` gets a copy, of several formats a folder each.

    Raises:
        DoesNotFit: for a format that does not hold the trained values, once the others are written.
    """
    names = job.config.export.formats
    targets = targets_of(names, copy_to)
    for target in targets.values():
        check_target(target, job.run.path)
    refused: list[DoesNotFit] = []
    known = TrainedOnce()
    for index, name in enumerate(names):
        path, form = job.run.export_dir / name, form_of(name)
        count = partial(_count, job, index, len(names))
        try:
            written, verified = job.checkpoints.patiently(
                partial(_write, job, path, form, count, known), _needed(job, form), "an export", path.parent
            )
        except DoesNotFit as error:  # of this format: the others are written all the same
            refused.append(error)
            continue
        if written.dropped_code and job.source.trust_remote_code:
            job.report.warning(
                "auto_map",
                "the export does not name code that does not come with the model: "
                + ", ".join(written.dropped_code),
            )
        if verified.note:
            job.report.warning("dtype", verified.note, hint=OTHER_DTYPE_HINT)
        heard = partial(hear, job.report)
        job.report.doing = "noting its files"
        # Not left here: the export has its name, and is not told of yet.
        files = digests(path, job.run.path, partial(job.report.expect_silence, COPY_SILENCE))
        copied = ""
        try:
            if name in targets:
                job.report.doing = f"copying to {targets[name]}"
                copy_whole(path, targets[name], run=job.run.path, poll=heard)
                require_same(targets[name], files, job.report)
                copied = str(targets[name])
        finally:  # the export in the run stands, whatever becomes of its copy
            _tell(job, written, verified, files, copied)
    if refused:
        raise refused[0]


def _count(job: Job, index: int, formats: int, checking: bool, done: int, _: int) -> None:
    """How far the phase is: each format is written block by block, and then read back twice so."""
    job.report.doing = "reading it back" if checking else "writing"
    job.report.step((3 * index + checking) * job.blocks + done, 3 * formats * job.blocks)


def _needed(job: Job, form: Form) -> int:
    """Bytes of one export."""
    tensors = job.plan.export_sizes[form.format.name]
    shards = 1 + int(tensors / (job.config.export.shard_gib * 2**30))
    form = form.with_heads(job.lm, job.heads)
    return tensors + room_beside_tensors(form, job.lm, job.source, shards)


def _write(
    job: Job, path: Path, form: Form, count: Callable[[bool, int, int], None], known: TrainedOnce
) -> tuple[ExportResult, VerifyResult]:
    """A new export at ``path``, verified; an EqatError, and the old one, when it is not what was trained."""
    verified: list[VerifyResult] = []

    def is_trained(folder: Path) -> bool:
        verified.append(_verify(job, form, folder, partial(count, True), known))
        if verified[0].verified:
            add_to_card(folder, verified[0].words())
        for said in filter(None, (verified[0].rounded, verified[0].note)):
            add_to_card(folder, said)
        return verified[0].verified

    export = Export(
        form=form,
        lm=job.lm,
        source=job.source,
        block_for=job.packed,
        shard_bytes=int(job.config.export.shard_gib * 2**30),
        card=_card(job),
        dtype=job.config.export.dtype,
        on_block=partial(count, False),
        heads=job.heads,
    )
    job.report.expect_silence(BEGIN_SILENCE)
    written = export.into(path, verify=is_trained, root=job.run.path)
    verified[0].raise_if_failed(str(ExportPlace(path, job.run.path).failed))
    return written, verified[0]


def _verify(
    job: Job, form: Form, folder: Path, on_block: Callable[[int, int], None], known: TrainedOnce
) -> VerifyResult:
    """Read the files back and compare bits and logits."""
    tokens = job.tokens.any()
    if not len(tokens):
        tokens = torch.arange(VERIFY_TOKENS).remainder(job.lm.vocab_size).unsqueeze(0)
    return verify(
        folder,
        form,
        job.lm,
        job.packed,
        tokens[:VERIFY_WINDOWS, :VERIFY_TOKENS],
        dtype=job.config.export.dtype,
        on_block=on_block,
        heads=job.heads,
        known=known,
    )


def _tell(
    job: Job, written: ExportResult, verified: VerifyResult, files: dict[str, str], copied_to: str
) -> None:
    job.report.emit(
        events.Export(
            format=written.format,
            path=str(written.path.relative_to(job.run.path)),
            verified=verified.verified,
            max_logit_diff=verified.max_logit_diff,
            bytes=written.bytes,
            fp_bytes=written.fp_bytes,
            bits_per_weight=written.bits_per_weight,
            logit_tolerance=verified.tolerance,
            perplexity=verified.perplexity_packed,
            perplexity_trained=verified.perplexity_trained,
            tokens=verified.tokens,
            rounded=verified.rounded,
            copied_to=copied_to,
            files=files,
        )
    )


def _answers_in_words(job: Job) -> str:
    """Of what the answers are that were measured; empty where none were."""
    if job.tokens.held_out is None:
        return ""
    section, held_out = job.config.instructions, job.tokens.held_out
    windows, length = held_out.tokens_NT.shape
    template = "the chat template" if section.template == "model" else section.template
    return (
        f"{int(held_out.answers.counts_N.sum()):,} answer tokens of conversations held out of "
        f"{corpus_name(section.data)}, {windows} sequences of {length} tokens written by {template}"
    )


def _card(job: Job) -> dict[str, Any]:
    """What the model card says."""
    config = job.config
    tells = mixture(config.data) or config.instructions.source is not None
    evaluation, begin = job.tokens.evaluation, job.encoder.words()
    # Where it was computed is left out; over how many GPUs gradients were added up decides.
    runtime = RuntimeConfig(seed=config.runtime.seed, gpus=config.runtime.gpus)
    return {
        "base_model": config.imported.reference or config.model.source,
        "imported": config.imported.enabled,
        "command": equivalent_command(config),
        "config": to_toml(msgspec.structs.replace(config, runtime=runtime)),
        "perplexity": job.perplexities,
        "answer_perplexity": job.answer_perplexities,
        "answers": _answers_in_words(job),
        "accuracy": job.accuracies,
        "further": {stage: further_of(job, stage) for stage in job.perplexities},
        # The configuration below the list names a single text.
        "method": [f"trained on {learned_words(config)}"] if tells else [],
        "doubts": [said for stage in STAGES if (said := doubted(job, stage))],
        "versions": package_versions(),
        "evaluation": f"{corpus_name(config.evaluation.data)}, {evaluation.shape[0]} windows of "
        f"{evaluation.shape[1]} tokens" + (f"; {begin}" if begin else ""),
    }
