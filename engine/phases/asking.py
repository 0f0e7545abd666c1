"""The questions of tasks, and what of a run lm-eval needs to ask its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from engine.config.tasks import lm_task, require_lm_eval, task_name
from engine.data.tasks import questions
from engine.errors import PreflightError
from engine.evaluation.answering import Means, answering, too_large
from engine.evaluation.harness import HarnessTasks, ask, find_tasks
from engine.evaluation.room import free_for_blocks
from engine.evaluation.tasks import TokenizedTask, tokenize
from engine.phases.job import Job
from engine.phases.text import PREPARE_SILENCE
from engine.run.measures import TaskScore

TASKS_SILENCE = 1800
"""Seconds that fetching the questions of tasks and writing their prompts may take unheard."""


def find_questions(job: Job) -> None:
    """The questions of ``evaluation.tasks``.

    Raises:
        EqatError: for a task that cannot be asked.
    """
    job.tasks = _questions(job)
    job.harness = _of_lm_eval(job)


def _questions(job: Job) -> Mapping[str, TokenizedTask]:
    """Early, so that a task that cannot be read does not wait for the first evaluation to say so."""
    found = {}
    for name in job.config.evaluation.tasks:
        if lm_task(name) is not None:
            continue
        job.report.leave_if_asked()
        job.report.expect_silence(PREPARE_SILENCE)
        asked = questions(name, job.config.evaluation.task_limit)
        found[task_name(name)] = tokenize(asked, job.encoder, job.lm.position_table)
    return found


def _of_lm_eval(job: Job) -> HarnessTasks | None:
    """The tasks that lm-eval asks, found as early; those that let a model write which has no room for that
    are refused before anything is trained."""
    section = job.config.evaluation
    asked = [task for name in section.tasks if (task := lm_task(name)) is not None]
    if not asked:
        return None
    require_lm_eval(section.tasks)
    job.report.doing = "reading tasks"
    job.report.expect_silence(TASKS_SILENCE)
    found = find_tasks(asked, folder=section.task_folder, limit=section.task_limit, chat=section.task_chat)
    job.report.expect_silence(PREPARE_SILENCE)
    if found.lets_write and (problem := too_large(job.lm, means_of(job))):
        raise PreflightError(problem, where="evaluation.tasks", hint="leave out tasks that let it write")
    return found


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
