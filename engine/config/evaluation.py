"""How each version of the model is measured."""

from __future__ import annotations

from engine.config import checks
from engine.config.base import Section
from engine.config.data import DataConfig
from engine.config.tasks import TASKS, task_name
from engine.errors import UsageError


class EvaluationConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Perplexity on non-overlapping windows."""

    enabled: bool = True
    """Perplexity is measured before, between and after the trainings."""
    data: DataConfig = DataConfig(source="wikitext2", split="test")
    sequence_length: int = 2048
    """A window has this many tokens of context."""
    windows: int = 0
    """At most this many windows are measured; 0 takes the whole text."""
    batch_size: int = 4
    """A forward pass takes this many windows."""
    tasks: tuple[str, ...] = ()
    """These zero-shot tasks are asked: winogrande, piqa, hellaswag, arc_easy, arc_challenge, or .jsonl files
    of questions."""
    task_limit: int = 0
    """At most this many questions of each task are asked; 0 takes all."""

    def check(self, name: str) -> None:
        self.data.check(f"{name}.data")
        if self.data.is_own:
            raise UsageError(
                "a model is not measured on what it writes itself",
                where=f"{name}.data.source",
                hint="name another text, such as wikitext2 or builtin",
            )
        checks.count(f"{name}.sequence_length", self.sequence_length, least=2)
        checks.count(f"{name}.windows", self.windows, least=0)
        checks.count(f"{name}.batch_size", self.batch_size)
        checks.count(f"{name}.task_limit", self.task_limit, least=0)
        for task in self.tasks:
            if task not in TASKS and not task.endswith(".jsonl"):
                raise UsageError(
                    f"there is no task {task!r}",
                    where=f"{name}.tasks",
                    hint=f"{', '.join(TASKS.names())}, or a .jsonl file of questions",
                )
        names = [task_name(task) for task in self.tasks]
        if len(set(names)) < len(names):
            raise UsageError("two tasks have the same name", where=f"{name}.tasks", hint="name each once")

    @classmethod
    def decides(cls, field: str) -> bool:
        return field != "batch_size"
