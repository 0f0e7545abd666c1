"""The table of zero-shot tasks that are known by name: one row a task.

A ``.jsonl`` file of questions is a task as well; it needs no row. Any other name is one of lm-eval's, which
asks its tasks itself, if it is installed: ``mmlu:5`` with five examples before each question,
``lm-eval/piqa`` where a row of the table has the same name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import PurePath
from typing import NamedTuple

import msgspec

from engine.config.corpora import HubSource
from engine.config.tables import Table
from engine.errors import PreflightError


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """Where a task's questions are, and how they are asked."""

    name: str
    """What ``evaluation.tasks`` calls it, and reports."""
    source: HubSource
    ask: str
    """``module:function`` that makes a :class:`~engine.data.tasks.Question` of a row."""


TASKS = Table(
    "task",
    Task(
        name="winogrande",
        source=HubSource("allenai/winogrande", "winogrande_xl", split="validation"),
        ask="engine.data.tasks:winogrande",
    ),
    Task(name="piqa", source=HubSource("baber/piqa", split="validation"), ask="engine.data.tasks:piqa"),
    Task(
        name="hellaswag",
        source=HubSource("Rowan/hellaswag", split="validation"),
        ask="engine.data.tasks:hellaswag",
    ),
    Task(
        name="arc_easy",
        source=HubSource("allenai/ai2_arc", "ARC-Easy", split="test"),
        ask="engine.data.tasks:arc",
    ),
    Task(
        name="arc_challenge",
        source=HubSource("allenai/ai2_arc", "ARC-Challenge", split="test"),
        ask="engine.data.tasks:arc",
    ),
)


LM_EVAL = "lm-eval/"
"""Before a name that is lm-eval's, where it would otherwise be one of the table."""
INSTALL_LM_EVAL = "pip install 'eqat[tasks]'"
QUESTIONS = ".jsonl"
"""How a file of questions of one's own ends."""
MOST_SHOTS = 100
_LM_TASK = re.compile(r"(?P<name>[\w.+()\-]{1,120})(:(?P<shots>[0-9]{1,4}))?")


class LmTask(NamedTuple):
    """A task, a group or a tag of lm-eval."""

    name: str
    shots: int | None = None
    """Examples before each question; none takes as many as the task says."""


def lm_task(name: str) -> LmTask | None:
    """What of lm-eval's is meant; None for a task of the table, a file, and what can be no name."""
    if name in TASKS or name.endswith(QUESTIONS):
        return None
    found = _LM_TASK.fullmatch(name.removeprefix(LM_EVAL))
    if found is None:
        return None
    return LmTask(found["name"], None if found["shots"] is None else int(found["shots"]))


def require_lm_eval(tasks: Iterable[str]) -> None:
    """Nothing, where none of the tasks is lm-eval's or it is installed; it is not imported for that.

    Raises:
        PreflightError: says what installs it.
    """
    asked = next((name for name in tasks if lm_task(name) is not None), None)
    if asked is not None and find_spec("lm_eval") is None:
        raise PreflightError(
            f"{asked!r} is none of {', '.join(TASKS.names())}; lm-eval, which may know it, is not installed",
            where="evaluation.tasks",
            hint=INSTALL_LM_EVAL,
        )


def task_name(name: str) -> str:
    """What a task is called in a report: its name, or that of its file without the ending."""
    return name if name in TASKS or lm_task(name) is not None else PurePath(name).stem
