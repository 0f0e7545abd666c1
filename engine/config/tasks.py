"""The table of zero-shot tasks that are known by name: one row a task.

A ``.jsonl`` file of questions is a task as well; it needs no row.
"""

from __future__ import annotations

from pathlib import PurePath

import msgspec

from engine.config.corpora import HubSource
from engine.config.tables import Table


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


def task_name(name: str) -> str:
    """What a task is called in a report: its name, or that of its file without the ending."""
    return name if name in TASKS else PurePath(name).stem
