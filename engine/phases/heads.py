"""The embedding and the head of a run that quantizes them too (``grid.head_bits``).

They are rounded once, before anything is trained, and kept in the checkpoint: what is measured and exported
has to be the same numbers wherever the run goes on. Training itself reads the original ones, and so does what
teaches it. Those of an imported checkpoint that has quantized them are taken over as they are.
"""

from __future__ import annotations

from engine.export.imported import ImportedSource, imported_heads, quantized_heads
from engine.methods.blockwise.rtn import round_matrix
from engine.models.heads import head_names
from engine.phases.job import Job
from engine.phases.text import PREPARE_SILENCE
from engine.quant.packed import PackedBlock
from engine.run.facts import HEAD


def quantize_heads(job: Job) -> None:
    """Round embedding and head to the grid, unless an earlier attempt did, or the run leaves them alone."""
    config = job.config.grid
    if config.head is None or HEAD in job.store:
        return
    if isinstance(job.source, ImportedSource) and (heads := quantized_heads(job.lm, job.source)):
        taken = imported_heads(job.source, heads, config.head)
        job.checkpoints.commit("prepare", entries={HEAD: PackedBlock(taken).tensors()})
        return
    job.report.doing = "rounding embedding and head"
    found = {}
    for name in head_names(job.lm):
        job.report.expect_silence(PREPARE_SILENCE)
        weight = job.lm.weights.load(f"{name}.weight").to(job.device)
        found[name] = round_matrix(
            weight,
            config.head,
            method=config.range,
            norm=config.search_norm,
            poll=job.report.leave_if_asked,
        )
    job.checkpoints.commit("prepare", entries={HEAD: PackedBlock(found).tensors()})
