"""Accuracy on zero-shot tasks, one decoder block in memory at a time.

Every question becomes a few rows of tokens, a context and a possible continuation each. The model's answer is
the row whose continuation has the largest sum of log-probabilities (``acc`` in lm-eval).

These are the tasks that eqat asks itself; those that lm-eval asks are in :mod:`engine.evaluation.harness`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.architecture.positions import PositionTable
from engine.data.encoding import Encoder
from engine.data.tasks import Question
from engine.evaluation.rows import pass_rows, rows_bytes
from engine.run.measures import EQAT, TaskScore

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

LONGEST = 2048
"""Longer rows lose the beginning of their context."""
QUESTIONS = "the questions of evaluation.tasks"


@dataclass(frozen=True)
class Row:
    """Tokens of a context and a continuation, which is the last ``scored`` of them."""

    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class TokenizedTask:
    """Rows of all questions, and which of them belong together."""

    rows: tuple[Row, ...]
    spans: tuple[tuple[int, int], ...]
    """First row and end of each question's rows."""
    gold: tuple[int, ...]


@dataclass(frozen=True)
class Accuracy:
    """Share of the questions that were answered rightly, with the standard error of that share."""

    accuracy: float
    questions: int

    @property
    def stderr(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / max(1, self.questions - 1))


def own_score(task: str, found: Accuracy) -> TaskScore:
    """The same as numbers of lm-eval's tasks are kept."""
    return TaskScore(
        task=task,
        metric="acc",
        value=found.accuracy,
        stderr=found.stderr,
        shots=0,
        questions=found.questions,
        by=EQAT,
    )


def tokenize(
    questions: Sequence[Question], encoder: Encoder, table: PositionTable | None = None
) -> TokenizedTask:
    """Questions as tokens; spaces at a context's end go to the continuation.

    Each row begins with what the model's sequences begin with, also one that loses a part of its context, and
    has no other special token. Of a question that is too long, or longer than the model's table of positions,
    the end is asked.
    """
    longest = LONGEST if table is None else min(LONGEST, table.rows)
    rows: list[Row] = []
    spans = []
    begin = encoder.begin
    for question in questions:
        first = len(rows)
        for context, continuation in question.pairs:
            kept = context.rstrip()
            texts = [kept + context[len(kept) :] + continuation, kept]
            whole, before = encoder.bare(texts, QUESTIONS)
            # A tokenizer may join the two where they meet; at least one token is asked for.
            scored = max(1, len(whole) - len(before))
            whole = whole[len(begin) :] if encoder.begins(whole) else whole
            ids = (*begin, *encoder.known(whole, QUESTIONS)[-(longest - len(begin)) :].tolist())
            if len(ids) == 1:
                ids = (ids[0], *ids)  # nothing precedes it: any token will do, and the same for all
            rows.append(Row(ids, min(scored, len(ids) - max(1, len(begin)))))
        spans.append((first, len(rows)))
    return TokenizedTask(tuple(rows), tuple(spans), tuple(question.gold for question in questions))


@torch.no_grad()
def accuracies(
    lm: CausalLM,
    block_for: Callable[[int], nn.Module],
    tasks: Mapping[str, TokenizedTask],
    *,
    folder: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, all: None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Accuracy]:
    """Accuracy of the model whose ``i``-th block is ``block_for(i)``, by task.

    Hidden states that memory has no room for lie in files in ``folder``. ``on_progress(done, all)``
    counts batches that have passed a block or the head; ``on_batch()`` is called before each. What they raise
    ends the evaluation.
    """
    rows = [row for task in tasks.values() for row in task.rows]
    scores = _scores(lm, block_for, rows, folder, on_progress, on_batch)
    results, start = {}, 0
    for name, task in tasks.items():
        right = 0
        for (first, end), gold in zip(task.spans, task.gold, strict=True):
            values = scores[start + first : start + end]
            right += values.index(max(values)) == gold
        results[name] = Accuracy(right / len(task.gold), len(task.gold))
        start += len(task.rows)
    return results


def hidden_bytes(lm: CausalLM, tasks: Mapping[str, TokenizedTask]) -> int:
    """What the hidden states of all questions take, in memory or in files."""
    return rows_bytes(lm, [row.ids for task in tasks.values() for row in task.rows])


def _scores(
    lm: CausalLM,
    block_for: Callable[[int], nn.Module],
    rows: Sequence[Row],
    folder: Path | None,
    on_progress: Callable[[int, int], None],
    on_batch: Callable[[], None],
) -> list[float]:
    """Sum of the log-probabilities of each row's continuation."""
    scores = [-math.inf] * len(rows)

    def heard(place: int, hidden_TH: Tensor) -> None:
        scores[place] = _log_probability(lm, hidden_TH, rows[place])

    pass_rows(lm, block_for, [row.ids for row in rows], heard, folder, on_progress, on_batch)
    # An undefined number is the worst answer, not the best.
    return [-math.inf if math.isnan(score) else score for score in scores]


def _log_probability(lm: CausalLM, hidden_TH: Tensor, row: Row) -> float:
    end = len(row.ids) - 1
    targets = torch.tensor(row.ids[-row.scored :], device=lm.device)
    total = torch.zeros((), dtype=torch.float64, device=lm.device)
    scored_TH = hidden_TH[end - row.scored : end]
    for part in lm.head_chunks(row.scored):
        logits = lm.head(scored_TH[None, part])[0].float()
        total -= functional.cross_entropy(logits, targets[part], reduction="sum").double()
    return total.item()
