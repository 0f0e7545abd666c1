"""How each version of the model is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.config import checks
from engine.config.base import Section
from engine.config.calibration import part_name, read_text, same_text
from engine.config.corpora import CORPORA, corpus_name
from engine.config.data import OPTIONS, DataConfig
from engine.config.tasks import MOST_SHOTS, QUESTIONS, TASKS, lm_task, task_name
from engine.errors import UsageError


class EvaluationConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Perplexity on non-overlapping windows."""

    enabled: bool = True
    """Perplexity is measured before, between and after the trainings."""
    data: DataConfig = DataConfig(source="wikitext2", split="test")
    texts: tuple[str, ...] = ()
    """Perplexity is measured on these texts as well, like c4 or own.txt; what belongs to one is written with
    it, like c4?subset=de."""
    divergence: bool = True
    """Every quantized version is compared with full precision token by token and block by block, which costs
    another pass of the original model."""
    sequence_length: int = 2048
    """A window has this many tokens of context."""
    windows: int = 0
    """At most this many windows of each text are measured; 0 takes the whole text."""
    batch_size: int = 4
    """A forward pass takes this many windows, and on a GPU as many of a small model as fill it."""
    tasks: tuple[str, ...] = ()
    """These tasks are asked: winogrande, piqa, hellaswag, arc_easy, arc_challenge, .jsonl files of questions,
    or lm-eval's, like gsm8k, mmlu:5 or lm-eval/piqa."""
    task_limit: int = 0
    """At most this many questions of each task are asked; 0 takes all."""
    task_folder: str = ""
    """A folder of task files (.yaml) for lm-eval, whose names come before its own. Python code that they
    name is run."""
    task_chat: bool = False
    """Questions of lm-eval's tasks are put as a conversation, in the model's chat template."""

    def check(self, name: str) -> None:
        self.data.check(f"{name}.data")
        if self.data.is_own:
            raise UsageError(
                "a model is not measured on what it writes itself",
                where=f"{name}.data.source",
                hint="name another text, such as wikitext2 or builtin",
            )
        self._check_texts(f"{name}.texts")
        checks.count(f"{name}.sequence_length", self.sequence_length, least=2)
        checks.count(f"{name}.windows", self.windows, least=0)
        checks.count(f"{name}.batch_size", self.batch_size)
        checks.count(f"{name}.task_limit", self.task_limit, least=0)
        self._check_tasks(f"{name}.tasks")
        if self.task_folder and not any(map(lm_task, self.tasks)):
            raise UsageError("is for tasks of lm-eval", where=f"{name}.task_folder", hint="name one in tasks")

    def _check_tasks(self, name: str) -> None:
        for task in self.tasks:
            asked = lm_task(task)
            if asked is None and task not in TASKS and not task.endswith(QUESTIONS):
                raise UsageError(
                    f"there is no task {task!r}",
                    where=name,
                    hint=f"{', '.join(TASKS.names())}, a .jsonl file of questions, or a name of lm-eval's",
                )
            if asked is not None and (asked.shots or 0) > MOST_SHOTS:
                raise UsageError(
                    f"{task}: at most {MOST_SHOTS} examples stand before a question",
                    where=name,
                    hint="name fewer",
                )
        names = [lm_task(task) or task_name(task) for task in self.tasks]
        if len(set(names)) < len(names):
            raise UsageError("two tasks have the same name", where=name, hint="name each once")

    def _check_texts(self, name: str) -> None:
        first = part_name(self.data)
        seen: dict[object, str] = {_read_for_evaluation(self.data): first}
        for text in self.texts:
            data = read_text(name, text)
            checks.text(name, data.source, hint="a shortcut such as c4, a hub id, or a path")
            for option in OPTIONS:
                checks.optional_text(name, getattr(data, option))
            if data.is_own:
                raise UsageError(
                    "a model is not measured on what it writes itself", where=name, hint="name another text"
                )
            same = _read_for_evaluation(data)
            if same in seen:
                raise UsageError(
                    f"names one text twice: {seen[same]} and {text}", where=name, hint="name each text once"
                )
            seen[same] = text

    def every_text(self) -> tuple[DataConfig, ...]:
        """The texts that are measured, the run's own measure first."""
        return (self.data, *(read_text("evaluation.texts", text) for text in self.texts))

    def text_names(self) -> list[str]:
        """What each of :meth:`every_text` is called; one that is called as another one is has a number."""
        names: list[str] = []
        for index, data in enumerate(self.every_text()):
            own = part_name(data) if index else corpus_name(data)
            name, count = own, 2
            while name in names:
                name, count = f"{own} ({count})", count + 1
            names.append(name)
        return names

    @classmethod
    def decides(cls, field: str) -> bool:
        return field not in ("batch_size", "divergence")

    @classmethod
    def younger(cls) -> tuple[str, ...]:
        return ("texts", "divergence", "task_folder", "task_chat")

    @classmethod
    def silent(cls) -> tuple[str, ...]:
        return ("texts", "divergence", "task_folder", "task_chat")

    @classmethod
    def as_written_now(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        # ``data`` may be one text or a list of them, beside the table of one.
        data = tree.get("data")
        texts = [data] if isinstance(data, str) else data
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            return tree
        return {**tree, **texts_tree(texts)}


def _read_for_evaluation(data: DataConfig) -> DataConfig:
    """Equal for two spellings of one text; the split that is read anyway need not be named."""
    data = same_text(data)
    known = CORPORA.get(data.source)
    usual = known is not None and data.split == known.source.splits.get("evaluation")
    return msgspec.structs.replace(data, split=None) if usual else data


def texts_tree(texts: Sequence[str]) -> dict[str, Any]:
    """Fields of the section for texts as they are typed, the first of which is the run's own measure.

    Raises:
        UsageError: where there is none, or one cannot be read.
    """
    if not texts:
        raise UsageError("names no text", where="evaluation.data", hint="wikitext2, c4, builtin, or a path")
    data = read_text("evaluation.data", texts[0])
    fields = ("source", *OPTIONS)
    own = {field: value for field in fields if (value := getattr(data, field)) is not None}
    return {"data": own, "texts": list(texts[1:])}
