"""Questions of zero-shot tasks: which of a few texts does the model find likeliest?

The five tasks that quantization papers report come from the hub, asked as EleutherAI's lm-eval asks them
(its version 0.4.2); :mod:`engine.config.tasks` lists them. A ``.jsonl`` file brings a task of its own, one
question a line::

    {"query": "Question: …", "choices": ["…", "…"], "gold": 0}
    {"context_options": ["… so Sarah", "… so Maria"], "continuation": "always …", "gold": 1}

The first form asks which choice continues the query, the second (WinoGrande's) after which context the
continuation is likelier.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.tables import load_named
from engine.config.tasks import TASKS
from engine.data.hub import hub_rows
from engine.data.lines import TOO_DEEP, is_text, json_rows, stamped
from engine.errors import DataError

Row = dict[str, Any]
MOST_CHOICES = 1000


@dataclass(frozen=True)
class Question:
    """Contexts and what is to follow each of them; ``gold`` is the right pair."""

    pairs: tuple[tuple[str, str], ...]
    gold: int


def _follow(query: str, choices: list[str], gold: int) -> Question:
    return Question(tuple((query, f" {choice}") for choice in choices), gold)


def piqa(row: Row) -> Question:
    """A row of PIQA."""
    return _follow(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def arc(row: Row) -> Question:
    """A row of ARC."""
    choices = row["choices"]
    gold = list(choices["label"]).index(row["answerKey"])
    return _follow(f"Question: {row['question']}\nAnswer:", list(choices["text"]), gold)


def hellaswag(row: Row) -> Question:
    """A row of HellaSwag."""
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    query = _without_brackets(f"{row['activity_label']}: {context}")
    return _follow(query, [_without_brackets(ending) for ending in row["endings"]], int(row["label"]))


def _without_brackets(text: str) -> str:
    """WikiHow's marks."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


def winogrande(row: Row) -> Question:
    """A row of WinoGrande."""
    before, _, after = row["sentence"].partition("_")
    continuation = f" {after.strip()}"
    pairs = tuple((before + row[option], continuation) for option in ("option1", "option2"))
    return Question(pairs, int(row["answer"]) - 1)


def questions(name: str, limit: int = 0) -> list[Question]:
    """The questions of a task or of a file, the first ``limit`` of them (0: all).

    Raises:
        DataError: when they cannot be read, are none, or have another form.
    """
    task = TASKS.get(name)
    if task is not None:
        found = _take(_asked(hub_rows(task.source), load_named(task.ask), name), limit)
    else:
        found = _take(_asked(_lines(Path(os.path.expanduser(name))), _own, name), limit)
    if not found:
        raise DataError("there are no questions in it", where=name, hint="check evaluation.tasks")
    return found


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
            right = _is_question(question)
        except Exception:  # a row of any other form, in any way
            right = False
        if not right:
            raise DataError(
                f"question {number} has neither query, choices and gold nor context_options, continuation "
                "and gold",
                where=where,
                hint='{"query": "Question: …", "choices": ["…", "…"], "gold": 0}',
            )
        yield question


def _is_question(question: Question) -> bool:
    """Whether there are texts to choose from and one of them is right."""
    texts = [text for pair in question.pairs for text in pair]
    return (
        0 <= question.gold < len(question.pairs) <= MOST_CHOICES
        and all(isinstance(text, str) and is_text(text) for text in texts)
        and all(part for _, part in question.pairs)
    )


def _own(row: Row) -> Question:
    gold = row["gold"]
    if isinstance(gold, bool) or not isinstance(gold, int):
        raise TypeError
    if "context_options" in row:
        continuation = f" {row['continuation'].strip()}"
        return Question(tuple((context, continuation) for context in _list(row["context_options"])), gold)
    query = row["query"].rstrip()
    return _follow(query, [choice.strip() for choice in _list(row["choices"])], gold)


def _list(value: Any) -> list[Any]:
    # A text would be taken for a list of its letters.
    if not isinstance(value, list):
        raise TypeError
    return value


def _lines(path: Path) -> Iterator[Row]:
    for number, row in json_rows(stamped(path, "check evaluation.tasks")):
        if not isinstance(row, dict):
            deep = "is nested too deeply" if row is TOO_DEEP else "is not a JSON object"
            raise DataError(f"the line {deep}", where=f"{path}:{number}")
        yield row
