"""The phases ``evaluate_<stage>``: perplexity and zero-shot tasks of one version of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from engine import telemetry
from engine.config.corpora import corpus_name
from engine.config.model import RANDOM
from engine.config.stages import Stage, full_precision
from engine.config.tables import load_named
from engine.evaluation.answer_perplexity import answer_perplexity
from engine.evaluation.beside import Version
from engine.evaluation.measurement import Measurement, finite, read
from engine.evaluation.plausible import CHECK, doubt, grouped
from engine.evaluation.tasks import Accuracy, accuracies, hidden_bytes
from engine.export.stored import as_stored, outer_values
from engine.methods.blockwise.rtn import round_to_nearest
from engine.phases.asking import scores
from engine.phases.imported import original
from engine.phases.job import Job
from engine.plan.fit import host_budget
from engine.run import events
from engine.run.events import MEASUREMENT
from engine.run.facts import eval_fact
from engine.run.measures import Further, TaskScore

ACTIVATIONS = "the file of an evaluation's activations"
"""What a full disk has no room for while a model is evaluated."""
TOKENS_OF_A_QUESTION = 400
"""Of lm-eval, with all of its choices."""
PARTS = 1000
"""Of which so many are done, where two different things are counted."""
BlockFor = Callable[[int], nn.Module]


def evaluate(job: Job, stage: Stage, *, again: bool = False) -> None:
    """Measure one version of the model, unless an earlier attempt did; ``again`` measures it in any case."""
    name = eval_fact(stage.name)
    known = job.store.fact(name)
    if known is None or again:
        of = original(job) if stage.baseline else job
        block_for: BlockFor = partial(load_named(stage.block), of)
        with values_of(of, stage) as outer:
            version, first = Version(of.lm, block_for, outer), not of.world.rank
            found = measure(of, version, stage, of.tokens.measured())
            result = found.result.of_part(0, len(of.tokens.evaluation))
            known = {
                "perplexity": finite(result.perplexity),
                "tokens": result.tokens,
                "seconds": result.seconds,
                "nll": grouped(result.window_nll) if math.isfinite(result.perplexity) else [],
                **(ask_questions(of, version) if first else {}),
                **_further(of, found, ask_lm_eval(of, version) if first else ()),
                **(_answers(of, block_for) if first else {}),
            }
        job.store.remember(name, known)
        job.checkpoints.commit(job.report.phase_name)
    recall(job, stage.name)
    further = further_of(job, stage.name)
    job.report.emit(
        events.Eval(
            stage=stage.name,
            sequence_length=job.config.evaluation.sequence_length,
            corpus=corpus_name(job.config.evaluation.data),
            begin=job.encoder.words(),
            texts=further.texts,
            scores=further.scores,
            divergence=further.divergence,
            block_errors=further.block_errors,
            **{name: value for name, value in known.items() if name not in ("nll", "further")},
        )
    )
    if not job.world.rank and (said := doubted(job, stage)):
        job.report.warning(MEASUREMENT, said, hint=CHECK)


def doubted(job: Job, stage: Stage) -> str:
    """In words, that a version of the model is better than can be; empty where it is not. A model that is
    made up is worse than anything that was trained."""
    if stage.name == full_precision() or job.config.model.source.startswith(RANDOM):
        return ""
    full, other = (job.store.fact(eval_fact(name)) for name in (full_precision(), stage.name))
    return doubt(stage.label, full, other)


@contextmanager
def values_of(job: Job, stage: Stage) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """A quantized version is measured with the embedding, norm and head that its export has; inside of what
    this gives, the model has them."""
    if stage.scope == "nothing":
        yield nullcontext
        return
    values = list(job.stored_outer())
    yield partial(outer_values, job.lm, values)


def recall(job: Job, stage: str) -> None:
    """What the checkpoint knows of one version of the model, for the card of an export."""
    known = job.store.fact(eval_fact(stage))
    if known and known["perplexity"] is not None:
        job.perplexities[stage] = known["perplexity"]
    if known and known.get("answer_perplexity"):
        job.answer_perplexities[stage] = known["answer_perplexity"]
    if known and known.get("accuracy"):
        job.accuracies[stage] = known["accuracy"]


def further_of(job: Job, stage: str) -> Further:
    """What the checkpoint knows of one version besides; nothing where versions before measured it."""
    known = job.store.fact(eval_fact(stage)) or {}
    return msgspec.convert(known.get("further") or {}, Further)


# -- the versions of the model -------------------------------------------------------------------------


def full_block(job: Job, index: int) -> nn.Module:
    """Block ``index`` as it came."""
    return job.lm.load_block(index)


def rounded_block(job: Job, index: int) -> nn.Module:
    """Plain round-to-nearest between minimum and maximum: the baseline every method is compared with."""
    block = job.lm.load_block(index)
    plain = msgspec.structs.replace(job.config.grid, range="minmax")
    packed = round_to_nearest(block, job.lm.linear_names(index), plain)
    return as_stored(packed, job.export_dtype, job.lm.block_prefix(index)).install(block)


# -- measuring -----------------------------------------------------------------------------------------


def measure(job: Job, version: Version, stage: Stage, windows_NT: Tensor) -> Measurement:
    """Half as many windows at a time, from the beginning, as long as memory does not suffice. Several
    processes each measure a share of them, where there are enough."""
    ranks = job.world.size if len(windows_NT) >= job.world.size else 1
    if ranks > 1:
        own = _measure_here(job, version, stage, windows_NT[job.world.rank :: ranks])
        return Measurement.joined(job.world.gathered(own, Measurement))
    return _measure_here(job, version, stage, windows_NT)


def _measure_here(job: Job, version: Version, stage: Stage, windows_NT: Tensor) -> Measurement:
    batch = job.windows_together(windows_NT)
    full = full_version(job) if job.config.evaluation.divergence and stage.scope != "nothing" else None
    needed = windows_NT.numel() * job.lm.hidden_size * job.lm.dtype.itemsize * (1 if full is None else 2)
    while True:
        try:
            reading = partial(_read, job, version, full, windows_NT, batch)
            return job.checkpoints.patiently(reading, needed, ACTIVATIONS, job.run.cache_dir)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        telemetry.release_memory()
        job.report.warning("micro_batch", f"out of memory; evaluating again with {batch} windows at a time")


def full_version(job: Job) -> Version | None:
    """The model as it came; none of imported blocks whose original is not known."""
    if job.config.imported.enabled and not job.config.imported.reference:
        return None
    full = original(job)
    return Version(full.lm, partial(full_block, full))


def _read(
    job: Job, version: Version, full: Version | None, windows_NT: Tensor, batch_size: int
) -> Measurement:
    rank = f"-{job.world.rank}" if job.world.rank else ""
    return read(
        version,
        full,
        windows_NT,
        given=max(1, len(job.encoder.begin)),
        batch_size=batch_size,
        store_kind=job.plan.activation_store,
        store_paths=(
            job.run.cache_dir / f"evaluation-full{rank}.bin",
            job.run.cache_dir / f"evaluation{rank}.bin",
        ),
        store_budget_bytes=host_budget(job.config, job.plan.machine) // (2 * job.world.size),
        on_progress=partial(_tell, job, 0),
        on_batch=job.report.leave_if_asked,
    )


def ask_lm_eval(job: Job, version: Version) -> tuple[TaskScore, ...]:
    """Tasks that lm-eval asks, where there are any."""
    if job.harness is None:
        return ()
    with version.outer():
        asked = partial(scores, job, version.block_for, partial(_tell, job, 3))
        return job.checkpoints.patiently(asked, 0, ACTIVATIONS, job.run.cache_dir)


def _further(job: Job, found: Measurement, asked: tuple[TaskScore, ...]) -> dict[str, Any]:
    """What is remembered of a measurement besides the perplexity of the run's own text, if there is more."""
    own = len(job.tokens.evaluation)
    further = Further(
        texts=tuple(found.text(name, *span) for name, span in job.tokens.spans().items()),
        scores=asked,
        divergence=found.divergence(0, own),
        block_errors=found.block_errors(0, own),
    )
    return {} if further == Further() else {"further": msgspec.to_builtins(further)}


def _answers(job: Job, block_for: BlockFor) -> dict[str, float | int | None]:
    """Perplexity of the answers of held-out conversations, where there are some."""
    held_out = job.tokens.held_out
    if held_out is None:
        return {}
    needed = held_out.tokens_NT.numel() * job.lm.hidden_size * job.lm.dtype.itemsize

    def measured() -> tuple[float, int]:
        return answer_perplexity(
            job.lm,
            block_for,
            held_out.tokens_NT,
            held_out.answers,
            batch_size=1,
            store_kind=job.plan.activation_store,
            store_path=job.run.cache_dir / "answers.bin",
            store_budget_bytes=host_budget(job.config, job.plan.machine) // 2,
            on_progress=partial(_tell, job, 2),
            on_batch=job.report.leave_if_asked,
        )

    found, tokens = job.checkpoints.patiently(measured, needed, ACTIVATIONS, job.run.cache_dir)
    return {"answer_perplexity": found if math.isfinite(found) else None, "answer_tokens": tokens}


def _tell(job: Job, part: int, done: int, of: int) -> None:
    """How far the phase is: perplexity (0), tasks (1), answers (2), tasks of lm-eval (3), each as much of it
    as it has tokens."""
    tokens = _tokens(job)
    if sum(map(bool, tokens)) == 1:
        job.report.step(done, of)
        return
    passed = sum(tokens[:part]) + tokens[part] * done / of
    job.report.step(round(PARTS * passed / sum(tokens)), PARTS)


def _tokens(job: Job) -> tuple[float, float, float, float]:
    """Of the texts, of the tasks' questions, of the held-out conversations, and about so many of what lm-eval
    asks, which is written only when it is asked."""
    hidden, held_out = job.lm.hidden_size * job.lm.dtype.itemsize, job.tokens.held_out
    asked = hidden_bytes(job.lm, job.tasks) / hidden if job.tasks else 0.0
    answers = 0 if held_out is None else held_out.tokens_NT.numel()
    harness = 0 if job.harness is None else job.harness.questions * TOKENS_OF_A_QUESTION
    return job.tokens.measured_numel(), asked, answers, harness


def ask_questions(job: Job, version: Version) -> dict[str, dict[str, float]]:
    """Zero-shot tasks, where there are any."""
    if not job.tasks:
        return {}
    needed = hidden_bytes(job.lm, job.tasks)
    with version.outer():
        found = job.checkpoints.patiently(
            partial(_accuracies, job, version.block_for), needed, ACTIVATIONS, job.run.cache_dir
        )
    return {
        "accuracy": {name: result.accuracy for name, result in found.items()},
        "questions": {name: result.questions for name, result in found.items()},
    }


def _accuracies(job: Job, block_for: BlockFor) -> dict[str, Accuracy]:
    return accuracies(
        job.lm,
        block_for,
        job.tasks,
        folder=job.run.cache_dir,
        on_progress=partial(_tell, job, 1),
        on_batch=job.report.leave_if_asked,
    )
