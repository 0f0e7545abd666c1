"""The task ``eval`` on other texts, at another context or by another protocol than the run's own measure."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch

from engine.config.stages import Stage
from engine.config.tables import load_named
from engine.data.encoding import Encoder
from engine.data.tokens import token_windows
from engine.errors import DataError, EqatError
from engine.evaluation.beside import Version
from engine.evaluation.measurement import result_of
from engine.evaluation.tasks import Accuracy, own_score
from engine.phases.asking import find_questions
from engine.phases.evaluation import ask_lm_eval, ask_questions, measure, values_of
from engine.phases.imported import original
from engine.phases.job import Job
from engine.phases.text import PREPARE_SILENCE, Tokens
from engine.process import device_name
from engine.run.measured import Asked, How, Measured, as_asked, by_flags, keep


def measure_as_asked(job: Job, stage: Stage, how: How) -> None:
    """Measure one version of a run's model, and keep what comes of it beside the run.

    Raises:
        EqatError: for a text that cannot be read, or a context that the model has no positions for.
    """
    of = asked_job(job, how)
    of = original(of) if stage.baseline else of
    with values_of(of, stage) as outer:
        version = Version(of.lm, partial(load_named(stage.block), of), outer)
        measured = _on_texts(of, stage, version) if how.reads_texts else []
        keep(job.run, measured, _asked(of, stage, version))


def _on_texts(of: Job, stage: Stage, version: Version) -> list[Measured]:
    windows = of.tokens.measured()
    found = measure(of, version, stage, windows)
    names = of.config.evaluation.text_names()
    spans = [(0, len(of.tokens.evaluation)), *of.tokens.spans().values()]
    return [
        result_of(
            found,
            name,
            span,
            stage=stage.name,
            sequence_length=windows.shape[1],
            begin=of.encoder.words(),
            device=device_name(of.device),
        )
        for name, span in zip(names, spans, strict=True)
    ]


def _asked(of: Job, stage: Stage, version: Version) -> list[Asked]:
    """Answers to tasks, those that eqat asks itself first."""
    own = ask_questions(of, version)
    found = [
        own_score(name, Accuracy(share, int(own["questions"][name])))
        for name, share in own.get("accuracy", {}).items()
    ]
    device, now = device_name(of.device), time.time()
    found += ask_lm_eval(of, version)
    return [Asked(stage=stage.name, score=score, device=device, t=now) for score in found]


def asked_job(job: Job, how: How) -> Job:
    """The job with the text, the context and the protocol that were asked for."""
    config = as_asked(job.config, how)
    section = config.evaluation
    table = job.lm.position_table
    if table is not None and section.sequence_length > table.rows:
        raise table.refusal("--sequence-length", section.sequence_length)
    encoder = Encoder(job.source.tokenizer(), rows=job.lm.vocab_size, bos=config.model.bos)
    read: list[torch.Tensor] = []
    for data in section.every_text() if how.reads_texts else ():
        job.report.leave_if_asked()
        job.report.expect_silence(PREPARE_SILENCE)
        try:
            windows = token_windows(
                encoder,
                data,
                "evaluation",
                sequences=section.windows,
                length=section.sequence_length,
                warn=lambda code, message: job.report.warning(code, message),
            )
        except DataError as error:
            raise by_flags(error) from error
        read.append(windows)
    nothing = torch.zeros((0, section.sequence_length), dtype=torch.long)
    further = dict(zip(section.text_names()[1:], read[1:], strict=True)) if read else {}
    tokens = Tokens({}, read[0] if read else nothing, further=further)
    of = replace(job, config=config, encoder=encoder, tokens=tokens, tasks={}, harness=None)
    try:
        find_questions(of)
    except EqatError as error:
        raise by_flags(error) from error
    return of
