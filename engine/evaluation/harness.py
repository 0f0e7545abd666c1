"""Tasks that lm-eval asks: any that it knows, with its own prompts, examples, filters and metrics.

What is ours is the model (:mod:`engine.evaluation.answering`) and where questions come from: the names that
lm-eval has, and before them those of a folder of task files. Examples are drawn as ``lm_eval`` itself draws
them on the command line, so that its numbers for the same model are the same. lm-eval is an extra, and
imported only where a task of it is asked.
"""

from __future__ import annotations

import difflib
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from engine.config.tasks import LmTask
from engine.errors import DataError, EqatError, StopRequested, UsageError, first_line
from engine.run.measures import MOST_SCORES, TaskScore

WHERE = "evaluation.tasks"
_SEED = 1234
"""Of examples and of what else lm-eval draws, as on its command line; random's own is 0 there."""
_ITERATIONS = 1000
"""Of a bootstrap, for the standard error of metrics that have no formula for it."""


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks that were found, by how many examples stand before their questions."""

    loaded: Mapping[int | None, Mapping[str, Any]]
    """As lm-eval has them: ``tasks`` and ``groups`` by name."""
    asked: tuple[LmTask, ...]
    limit: int = 0
    """Questions of each task; 0 takes all."""
    chat: bool = False
    questions: int = 0
    """Of all tasks."""

    @property
    def lets_write(self) -> bool:
        """Whether any of them asks the model for text."""
        return any(
            task.OUTPUT_TYPE == "generate_until"
            for one in self.loaded.values()
            for task in one["tasks"].values()
        )


def find_tasks(
    asked: Sequence[LmTask], *, folder: str = "", limit: int = 0, chat: bool = False
) -> HarnessTasks:
    """The tasks with their questions, which may have to be fetched.

    Raises:
        UsageError: for a name that lm-eval does not know.
        DataError: where a task or its questions cannot be read.
    """
    with _as_on_its_command_line(), _refusing("its questions cannot be read"):
        manager = _manager(asked, folder)
        _require_known(asked, manager)
        loaded: dict[int | None, Mapping[str, Any]] = {}
        for shots in dict.fromkeys(task.shots for task in asked):
            names = [task.name for task in asked if task.shots == shots]
            loaded[shots] = manager.load(names)
            for task in loaded[shots]["tasks"].values():
                _set_shots(task, shots)
        found = [task for one in loaded.values() for task in one["tasks"].values()]
        counts = [len(task.eval_docs) for task in found]
    questions = sum(min(count, limit) if limit else count for count in counts)
    if not questions:
        raise DataError("there are no questions in them", where=WHERE, hint="check the files of the tasks")
    return HarnessTasks(loaded, tuple(asked), limit, chat, questions)


def ask(tasks: HarnessTasks, model: Any) -> tuple[TaskScore, ...]:
    """What lm-eval makes of ``model``'s answers (:func:`engine.evaluation.answering.answering`).

    Raises:
        DataError: where a task of it does not work.
    """
    from lm_eval.evaluator import evaluate

    scores: list[TaskScore] = []
    for shots, loaded in tasks.loaded.items():
        with _as_on_its_command_line(), _refusing("the task does not work"):
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(_SEED)  # every version of the model sees the same examples
            found: Any = evaluate(
                model,
                dict(loaded),
                limit=tasks.limit or None,
                log_samples=False,
                bootstrap_iters=_ITERATIONS,
                apply_chat_template=tasks.chat,
                fewshot_as_multiturn=tasks.chat,
            )
        names = [task.name for task in tasks.asked if task.shots == shots]
        scores += _scores(found, _told(names, loaded, found))
    return tuple(scores[:MOST_SCORES])


def _manager(asked: Sequence[LmTask], folder: str) -> Any:
    """Of what is in the folder alone where that has all names, since the list of lm-eval's own is long."""
    from lm_eval.tasks import TaskManager

    if folder:
        own = TaskManager(include_path=folder, include_defaults=False)
        if all(own._entry(task.name) for task in asked) and not any(map(_is_group(own), asked)):
            return own
    return TaskManager(include_path=folder or None)


def _is_group(manager: Any) -> Any:
    """Whether a task is several, whose members may be elsewhere."""
    return lambda task: task.name not in manager.all_subtasks


def _require_known(asked: Sequence[LmTask], manager: Any) -> None:
    for task in asked:
        if task.name not in manager.task_index:
            near = difflib.get_close_matches(task.name, manager.all_tasks, 3)
            raise UsageError(
                f"lm-eval knows no task {task.name!r}",
                where=WHERE,
                hint=f"such as {', '.join(near)}" if near else "lm-eval ls tasks lists what it knows",
            )


def _set_shots(task: Any, shots: int | None) -> None:
    """As lm-eval's own command does: a task that says 0 itself stays without examples."""
    says = task.get_config("num_fewshot")
    if shots is not None and says != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif says is None:
        task.set_config(key="num_fewshot", value=0)


def _told(names: Sequence[str], loaded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Whose numbers are told: of what was asked for; of its members where it has none of its own."""
    told: list[str] = []
    for name in names:
        if any(metric for metric in found["results"].get(name, {}) if "," in metric):
            told.append(name)
            continue
        group = loaded.get("groups", {}).get(name)
        tasks = loaded["tasks"]
        members = group.child_names if group else [one for one in tasks if _tagged(tasks[one], name)]
        told += [member for member in members if member in found["results"]]
    return list(dict.fromkeys(told))


def _tagged(task: Any, tag: str) -> bool:
    tags = task.get_config("tag") or []
    return tag in ([tags] if isinstance(tags, str) else tags)


def _scores(found: Mapping[str, Any], names: Sequence[str]) -> Iterator[TaskScore]:
    by = f"lm-eval {version('lm-eval')}"
    for name in names:
        results = found["results"][name]
        shots, counts = found["n-shot"].get(name, 0), found["n-samples"]
        for key, value in results.items():
            metric, comma, chosen = str(key).partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = results.get(f"{metric}_stderr,{chosen}")
            better = found["higher_is_better"].get(name, {}).get(metric)
            yield TaskScore(
                task=name,
                metric=metric if chosen == "none" else f"{metric} ({chosen})",
                value=float(value) if math.isfinite(value) else None,
                stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                shots=shots if isinstance(shots, int) else None,
                questions=_count(counts, name, found),
                better="smaller" if better is False else "larger",
                by=by,
            )


def _count(counts: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> int:
    """Questions of a task, or of all members of a group."""
    if name in counts:
        return int(counts[name]["effective"])
    members = found.get("group_subtasks", {}).get(name, ())
    return sum(_count(counts, member, found) for member in members)


@contextmanager
def _as_on_its_command_line() -> Iterator[None]:
    """Generators of random numbers as lm-eval sets them, and afterwards as they were; no other processes, and
    no code that a task wants to have run outside of its own."""
    import numpy

    kept = random.getstate(), numpy.random.get_state(), os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            random.seed(0)
            numpy.random.seed(_SEED)
            torch.manual_seed(_SEED)
            yield
    finally:
        random.setstate(kept[0])
        numpy.random.set_state(kept[1])
        if kept[2] is None:
            os.environ.pop("DISABLE_MULTIPROC", None)
        else:
            os.environ["DISABLE_MULTIPROC"] = kept[2]


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever a task's files, its data or its code raise is told in a line."""
    try:
        yield
    except (EqatError, StopRequested, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        if error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # a full disk is no fault of the task
        raise _unfit(what, error) from error
    except Exception as error:
        raise _unfit(what, error) from error


def _unfit(what: str, error: Exception) -> DataError:
    said = first_line(error, 200) if str(error).strip() else type(error).__name__
    hint = "check its files and the network, or install what it needs"
    if isinstance(error, ImportError):
        hint = "install what the task needs"
    return DataError(f"{what}: {said}", where=WHERE, hint=hint)
