"""Texts that a run names: whether files are there, and other names may lead to a text. What is in them the
engine judges."""

from __future__ import annotations

import os

from engine.config.calibration import mixture, texts_of
from engine.config.corpora import is_path, local_path, names_a_text, no_text
from engine.config.run import RunConfig
from engine.config.tasks import QUESTIONS
from engine.errors import DataError


def check_local_files(config: RunConfig, *, reads_text: bool) -> None:
    """A mistyped path or name should not cost a run, which ``reads_text`` for calibration or does not.

    Raises:
        DataError: for a file or folder that is not there, a file with nothing in it, or a name behind which
            no text can lie.
    """
    name = "data.mix" if mixture(config.data) else "data.source"
    used = [(name, text.data, reads_text) for text in texts_of(config.data)]
    if config.instructions.source is not None:
        used.append(("instructions.source", config.instructions.data, True))
    evaluation = config.evaluation
    folder = evaluation.task_folder
    if evaluation.enabled and folder and not os.path.isdir(local_path(folder)):
        raise DataError("no such folder", where=folder, hint="check evaluation.task_folder")
    used.append(("evaluation.data.source", evaluation.data, evaluation.enabled))
    used += [("evaluation.texts", data, evaluation.enabled) for data in evaluation.every_text()[1:]]
    for name, data, wanted in used:
        # Of instructions only a path is judged here.
        if wanted and (name != "instructions.source" or is_path(data.source)):
            refuse_no_text(data.source, name)
    for task in evaluation.tasks if evaluation.enabled else ():
        if task.endswith(QUESTIONS):
            refuse_missing(task, "check evaluation.tasks")


def refuse_no_text(source: str, field: str) -> None:
    """DataError for a ``source``, given in ``field``, behind which no text can lie."""
    if is_path(source):
        refuse_missing(source, f"check {field}")
    elif not names_a_text(source):
        raise no_text(source, field)


def refuse_missing(source: str, hint: str) -> None:
    """DataError for a file or folder that is not there, or a file with nothing in it."""
    path = local_path(source)
    if not os.path.exists(path):
        raise DataError("no such file or folder", where=source, hint=hint)
    if os.path.isfile(path) and path.stat().st_size == 0:
        raise DataError("the file is empty", where=source, hint=hint)
