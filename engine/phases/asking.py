"""What the phases of evaluation need of a run to have lm-eval ask its model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from engine.evaluation.answering import Means, answering
from engine.evaluation.harness import ask
from engine.phases.job import Job
from engine.phases.room import free_for_blocks
from engine.run.measures import TaskScore

TASKS_SILENCE = 1800
"""Seconds that fetching the questions of tasks and writing their prompts may take unheard."""


def means_of(job: Job, on_progress: Callable[[int, int], None] = lambda done, all: None) -> Means:
    """With what the questions are answered."""
    return Means(
        folder=job.run.cache_dir,
        batch_size=job.config.evaluation.batch_size,
        free_for_blocks=partial(free_for_blocks, job.config, job.device, job.plan.machine),
        on_progress=on_progress,
        on_batch=job.report.leave_if_asked,
    )


def scores(
    job: Job, block_for: Callable[[int], nn.Module], on_progress: Callable[[int, int], None]
) -> tuple[TaskScore, ...]:
    """Of the version of the model whose ``i``-th block is ``block_for(i)``; none where nothing is asked."""
    if job.harness is None:
        return ()
    job.report.expect_silence(TASKS_SILENCE)
    model = answering(job.lm, job.encoder, block_for, means_of(job, on_progress))
    return ask(job.harness, model)
