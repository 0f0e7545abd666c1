"""The phase ``prepare``: open the model (no block is loaded yet), tokenize the text, open the checkpoint."""

from __future__ import annotations

import torch

from engine.checkpoints.identity import counts_as, deciding_fields, default_fields
from engine.checkpoints.snapshots import forget_snapshot
from engine.checkpoints.store import CheckpointStore
from engine.config.run import RunConfig
from engine.config.runtime import GPUS
from engine.config.stages import measured_stage, network_stages, phases_of, stages_of, versions
from engine.data.encoding import Encoder
from engine.data.sampler import serves
from engine.errors import DamagedRun, UsageError
from engine.export.layout import form_of
from engine.export.stored import check_activations, check_values
from engine.gpu.compiled import SWITCH_HINT
from engine.models.carried import in_words
from engine.models.causal_lm import CausalLM
from engine.phases.asking import find_questions
from engine.phases.evaluation import recall
from engine.phases.heads import quantize_heads
from engine.phases.identity import digest, share_origin, warn_of_changes, write_manifest
from engine.phases.imported import open_reference, open_source
from engine.phases.instructions import check_packing
from engine.phases.job import Job, compute_dtype
from engine.phases.kernels import switch_on_kernels
from engine.phases.own_text import OwnText
from engine.phases.text import PREPARE_SILENCE, draw_tokens
from engine.plan.lengths import too_long
from engine.plan.plan import Plan
from engine.reporter import Reporter
from engine.run.directory import RunDirectory
from engine.run.facts import GPUS_NOW, TOGETHER, TRAINING, done_fact, eval_fact, micro_batch_fact
from engine.run.task import Task
from engine.run.trained import UNTRAINED


def prepare(
    run: RunDirectory,
    config: RunConfig,
    plan: Plan,
    report: Reporter,
    device: torch.device,
    task: Task,
    *,
    may_differ: tuple[str, ...] = (),
    asks: bool = True,
) -> Job:
    """Everything that the phases work with; settings that ``may_differ`` may be others than those of the
    checkpoint that the run goes on from. The questions of tasks are read where the run ``asks`` its own.

    Raises:
        EqatError: for a model, a text or a checkpoint that cannot be used.
        UsageError: when ``task`` needs a run that has finished training, and this one has not.
    """
    report.expect_silence(PREPARE_SILENCE)
    switch_on_kernels(config, device, report)
    report.doing = "opening the model"
    source = open_source(config)
    lm = CausalLM(source, device, compute_dtype("auto", device))
    for refusal in too_long(config, lm.position_table):  # of a model whose files the plan had not seen
        raise refusal
    if task in ("run", "export") and (said := in_words(lm)):
        report.warning("tensors", f"the checkpoint is not the model's alone: {said}")
    if task == "run" and plan.compiles_passages:
        compile_passages(lm, report)
    encoder = Encoder(source.tokenizer(), rows=lm.vocab_size, bos=config.model.bos)
    report.doing = "reading the text"
    identity = {name: value for name, value in source.identity().items() if name not in ("path", "name")}
    made_from = {"model": digest(identity), "tokenizer": source.assets_identity()}
    own = OwnText(run, config, lm, encoder, made_from, plan.machine, report)
    tokens = draw_tokens(config, encoder, report, own.windows)
    if task == "run" and config.instructions.source is not None and config.instructions.packing:
        report.doing = "trying whether conversations can share a sequence"
        check_packing(lm, report.leave_if_asked)
    made_from |= tokens.digests()
    if (reference := open_reference(config)) is not None:
        made_from["reference"] = digest(reference.identity()["sha256"])
    report.expect_silence(PREPARE_SILENCE)
    report.doing = "opening the checkpoint"
    store = CheckpointStore(
        run.checkpoints_dir,
        {**deciding_fields(config), **made_from},
        defaults=default_fields(config),
        may_differ=may_differ,
        on_damage=lambda message: report.warning("checkpoint", message),
    )
    _heed_other_size(store, config, report)
    share_origin(run, store, report)
    warn_of_changes(run, device, report)
    write_manifest(run, config, source, encoder, device, made_from)
    job = Job(run, config, plan, report, source, lm, encoder, tokens, store)
    if config.evaluation.enabled and task in ("run", "eval") and asks:
        find_questions(job)
    if task != "run":
        _require_finished(job, task)
    else:
        _remember_portions(job)
        # An export that cannot be written, or that nobody could read, must not wait until all is trained.
        check_values(lm, job.export_dtype, report.leave_if_asked)
        if config.export.formats and not job.is_finished(0):
            for name in config.export.formats:
                form_of(name).check(lm, job.export_dtype)
            check_activations(lm, job.export_dtype, tokens.any(), report.leave_if_asked)
    quantize_heads(job)
    for stage in versions():
        recall(job, stage)
    return job


def _heed_other_size(store: CheckpointStore, config: RunConfig, report: Reporter) -> None:
    """Of a run that goes on with another number of GPUs: a training whose batches would be others begins
    anew."""
    before = counts_as(store.current.identity, GPUS, store.defaults)
    now = counts_as(store.identity, GPUS, store.defaults)
    if not store.generation or before == now:
        return
    said = f"{GPUS} is {now} and was {before}: the result will have other last bits"
    training = store.fact(TRAINING)
    if training is not None:
        sampler = training["sampler"]
        if not serves(sampler.get("strata", 0), sampler["batch_size"], config.runtime.gpus):
            forget_snapshot(store)
            said += ", and the training that was interrupted begins anew, with other batches"
    store.remember(GPUS_NOW, config.runtime.gpus)
    report.warning("changed", said)


def _remember_portions(job: Job) -> None:
    """How much passes at a time, as the plan of the first attempt chose; the first checkpoint keeps it,
    before anything is trained of the whole network. A run with a checkpoint that does not say passes its
    batches."""
    if job.plan.numbers_together and not job.store.generation:
        job.store.remember(TOGETHER, job.plan.numbers_together)
    for stage in network_stages():
        name, chosen = micro_batch_fact(stage), job.plan.micro_batches.get(stage.name)
        if chosen is not None and job.store.fact(name) is None:
            job.store.remember(name, chosen)


def compile_passages(lm: CausalLM, report: Reporter) -> None:
    """Blocks are compiled for the streams that pass through them, and for perplexity."""
    lm.compile(expect_silence=report.expect_silence, on_failure=lambda why: _slower(report, why))


def _slower(report: Reporter, why: str) -> None:
    report.warning(
        "compile",
        f"evaluation and streams are slower, blocks cannot be compiled: {why}",
        hint=SWITCH_HINT,
    )


def _require_finished(job: Job, task: Task) -> None:
    """`eval`, `export` and `generate` work on what a run has trained; there must be all of it."""
    store, run = job.store, job.run
    networks = [stage for stage in stages_of(job.config) if stage in network_stages()]
    trained = job.all_blocks_finished() and all(store.fact(done_fact(stage)) for stage in networks)
    if trained and not (task == "export" and _lost_figures(job)):
        return
    if store.damage:
        raise DamagedRun(
            f"its checkpoint is damaged ({store.damage}), and this trains nothing",
            where=run.id,
            hint=f"eqat resume {run.id} trains what is damaged again",
        )
    raise UsageError(UNTRAINED, where=run.id, hint=f"eqat resume {run.id}")


def _lost_figures(job: Job) -> bool:
    """Whether damage took a perplexity that an export's card tells: without it the export would differ."""
    measured = filter(None, map(measured_stage, phases_of(job.config)))
    return bool(job.store.damage) and any(job.store.fact(eval_fact(stage)) is None for stage in measured)
