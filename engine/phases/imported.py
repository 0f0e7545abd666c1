"""The stage ``imported``: blocks out of a quantized checkpoint; and the original model of such a run."""

from __future__ import annotations

from dataclasses import replace

from engine.config.model import ModelConfig
from engine.config.run import RunConfig
from engine.errors import PreflightError
from engine.export.imported import (
    NO_NAMES,
    ImportedSource,
    check_whole,
    imported_block,
    imported_source,
    quantized_heads,
)
from engine.export.importing import require_original
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.phases.job import Job
from engine.run.facts import block_entry


def import_blocks(job: Job) -> None:
    """Every block of the checkpoint, as it is."""
    source = job.source
    assert isinstance(source, ImportedSource)
    heads = quantized_heads(job.lm, source) if job.config.grid.head_bits else NO_NAMES
    check_whole(job.lm, source, heads)
    for index in range(job.blocks):
        job.report.block_started(index, job.blocks)
        if job.is_finished(index):
            job.report.block_finished(restored=True)
            continue
        block = imported_block(job.lm, source, index, job.config.grid.shared)
        job.checkpoints.commit("imported", index, {block_entry(index): block.tensors()})
        job.report.block_finished()
        job.report.leave_if_asked()


def open_source(config: RunConfig) -> ModelSource:
    """The model of a run, which may be a quantized checkpoint."""
    return imported_source(config.model) if config.imported.enabled else ModelSource.open(config.model)


def open_reference(config: RunConfig) -> ModelSource | None:
    """The original of an imported model; none where the run has none, or is not imported."""
    name = config.imported.reference if config.imported.enabled else ""
    return ModelSource.open(ModelConfig(source=name, bos=config.model.bos)) if name else None


def original(job: Job) -> Job:
    """The job with the model as it came: of imported blocks, the one that they were made from.

    It is opened anew each time, since nobody needs it for long.

    Raises:
        PreflightError: where there is none, or the reference is another model.
    """
    if not job.config.imported.enabled:
        return job
    source = open_reference(job.config)
    if source is None:
        raise PreflightError(
            "the original model is not known", where="imported.reference", hint="import it with --reference"
        )
    lm = CausalLM(source, job.device, job.lm.dtype)
    require_original(job.lm, lm, source.name)
    return replace(job, source=source, lm=lm)
