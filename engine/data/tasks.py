"""Questions of zero-shot tasks: which of a few texts does the model find likeliest?

The five tasks that quantization papers report come from the hub, asked as EleutherAI's lm-eval asks them
(its version 0.4.2); a ``.jsonl`` file brings a task of its own, one question a line::

    {"query": "Question: …", "choices": ["…", "…"], "gold": 0}
    {"context_options": ["… so Sarah", "… so Maria"], "continuation": "always …", "gold": 1}

The first form asks which choice continues the query, the second (WinoGrande's) after which context the
continuation is likelier.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.hub import HubSource, hub_rows
from engine.run.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """Contexts and what is to follow each of them; ``gold`` is the right pair."""

    pairs: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Where a task's questions are, and how they are asked."""

    source: HubSource
    ask: Callable[[Row], Question]


def _follow(query: str, choices: list[str], gold: int) -> Question:
    return Question(tuple((query, f" {choice}") for choice in choices), gold)


def _piqa(row: Row) -> Question:
    return _follow(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _arc(row: Row) -> Question:
    choices = row["choices"]
    gold = list(choices["label"]).index(row["answerKey"])
    return _follow(f"Question: {row['question']}\nAnswer:", list(choices["text"]), gold)


def _hellaswag(row: Row) -> Question:
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    query = _without_brackets(f"{row['activity_label']}: {context}")
    return _follow(query, [_without_brackets(ending) for ending in row["endings"]], int(row["label"]))


def _without_brackets(text: str) -> str:
    """WikiHow's marks."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


def _winogrande(row: Row) -> Question:
    before, _, after = row["sentence"].partition("_")
    continuation = f" {after.strip()}"
    pairs = tuple((before + row[option], continuation) for option in ("option1", "option2"))
    return Question(pairs, int(row["answer"]) - 1)


TASKS: dict[str, Task] = {
    "winogrande": Task(HubSource("allenai/winogrande", "winogrande_xl", split="validation"), _winogrande),
    "piqa": Task(HubSource("baber/piqa", split="validation"), _piqa),
    "hellaswag": Task(HubSource("Rowan/hellaswag", split="validation"), _hellaswag),
    "arc_easy": Task(HubSource("allenai/ai2_arc", "ARC-Easy", split="test"), _arc),
    "arc_challenge": Task(HubSource("allenai/ai2_arc", "ARC-Challenge", split="test"), _arc),
}


def questions(name: str, limit: int = 0) -> list[Question]:
    """The questions of a task or of a file, the first ``limit`` of them (0: all).

    Raises:
        DataError: when they cannot be read, are none, or have another form.
    """
    if name in TASKS:
        task = TASKS[name]
        found = _take(_asked(hub_rows(task.source), task.ask, name), limit)
    else:
        found = _take(_asked(_lines(Path(name).expanduser()), _own, name), limit)
    if not found:
        raise DataError("there are no questions in it", where=name, hint="check evaluation.tasks")
    return found


def task_name(name: str) -> str:
    """What a task is called in a report."""
    return name if name in TASKS else Path(name).stem


def _take(found: Iterator[Question], limit: int) -> list[Question]:
    taken: list[Question] = []
    for question in found:
        taken.append(question)
        if len(taken) == limit:
            break
    return taken


def _asked(rows: Iterator[Row], ask: Callable[[Row], Question], where: str) -> Iterator[Question]:
    for number, row in enumerate(rows, 1):
        try:
            question = ask(row)
            right = 0 <= question.gold < len(question.pairs) and all(part for _, part in question.pairs)
        except (KeyError, ValueError, TypeError, AttributeError):
            right = False
        if not right:
            raise DataError(
                f"question {number} has neither query, choices and gold nor context_options, continuation "
                "and gold",
                where=where,
                hint='{"query": "Question: …", "choices": ["…", "…"], "gold": 0}',
            )
        yield question


def _own(row: Row) -> Question:
    gold = row["gold"]
    if isinstance(gold, bool) or not isinstance(gold, int):
        raise TypeError
    if "context_options" in row:
        continuation = f" {row['continuation'].strip()}"
        return Question(tuple((context, continuation) for context in row["context_options"]), gold)
    query = row["query"].rstrip()
    return _follow(query, [choice.strip() for choice in row["choices"]], gold)


def _lines(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except ValueError as error:
                    raise DataError(f"line {number} is no JSON", where=str(path)) from error
                if not isinstance(row, dict):
                    raise DataError(f"line {number} is no JSON object", where=str(path))
                yield row
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise DataError(
            f"cannot be read: {reason}", where=str(path), hint="check evaluation.tasks"
        ) from error
