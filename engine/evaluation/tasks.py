"""Accuracy on zero-shot tasks, one decoder block in memory at a time.

Every question becomes a few rows of tokens, a context and a possible continuation each. The model's answer is
the row whose continuation has the largest sum of log-probabilities (``acc`` in lm-eval).

As in :mod:`engine.evaluation.perplexity` all rows go through one block before the next is loaded. Rows are
sorted by length and padded at their end to a few common lengths; attention is causal, so nothing that counts
sees the padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.architecture.positions import PositionTable
from engine.config.runtime import StoreKind
from engine.data.activations import ActivationStore, make_store
from engine.data.encoding import Encoder
from engine.data.tasks import Question
from engine.models.ahead import one_ahead
from engine.quant.packed import unpacked

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

TOKENS_AT_A_TIME = 2048
"""Of a batch through a block."""
LENGTH_STEP = 32
LONGEST = 2048
"""Longer rows lose the beginning of their context."""
QUESTIONS = "the questions of evaluation.tasks"
CPU_MEMORY = 1 << 30
"""Hidden states up to this size stay in host memory where there is no GPU."""


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
    return _hidden_bytes(lm, _by_length(lm, [row for task in tasks.values() for row in task.rows]))


@dataclass(frozen=True)
class _Batch:
    places: tuple[int, ...]
    """Of the rows in the list."""
    ids_BT: Tensor
    store: ActivationStore
    start: int
    """Where it lies in the store."""


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
    with ExitStack() as stack:
        batches = list(_batches(lm, rows, folder, stack))
        for batch in batches:
            on_batch()
            batch.store.write(batch.start, lm.embed(batch.ids_BT.to(lm.device)))
        for index, block in stack.enter_context(closing(one_ahead(block_for, lm.blocks, lm.device))):
            with unpacked(block, lm.dtype):
                for number, batch in enumerate(batches, 1):
                    on_batch()
                    hidden = batch.store.read(slice(batch.start, batch.start + len(batch.ids_BT)))
                    batch.store.write(batch.start, lm.run_block(block, index, hidden))
                    on_progress(index * len(batches) + number, (lm.blocks + 1) * len(batches))
            del block  # before the next one is made
        for number, batch in enumerate(batches, 1):
            on_batch()
            hidden = batch.store.read(slice(batch.start, batch.start + len(batch.places)))
            for place, row_TH in zip(batch.places, hidden, strict=True):
                scores[place] = _log_probability(lm, row_TH, rows[place])
            on_progress(lm.blocks * len(batches) + number, (lm.blocks + 1) * len(batches))
    # An undefined number is the worst answer, not the best.
    return [-math.inf if math.isnan(score) else score for score in scores]


def _batches(lm: CausalLM, rows: Sequence[Row], folder: Path | None, stack: ExitStack) -> Iterator[_Batch]:
    """Rows of about the same length together; every batch of a length has the same size."""
    by_length = _by_length(lm, rows)
    needed = _hidden_bytes(lm, by_length)
    room = torch.cuda.mem_get_info(lm.device)[0] // 2 if lm.device.type == "cuda" else CPU_MEMORY
    kind: StoreKind = "device" if folder is None or needed <= room else "disk"
    for length, places in by_length.items():
        size, count = _batch_size(length, len(places))
        path = None if folder is None else folder / f"tasks-{length}.bin"
        shape = (count, length, lm.hidden_size)
        store = stack.enter_context(make_store(kind, shape, lm.dtype, lm.device, path))
        for start in range(0, len(places), size):
            chosen = tuple(places[start : start + size])
            ids_BT = torch.zeros(size, length, dtype=torch.long)
            for number, place in enumerate(chosen):
                ids_BT[number, : len(rows[place].ids)] = torch.tensor(rows[place].ids)
            yield _Batch(chosen, ids_BT, store, start)


def _by_length(lm: CausalLM, rows: Sequence[Row]) -> dict[int, list[int]]:
    """Places of the rows that are padded to each length."""
    by_length: dict[int, list[int]] = {}
    table = lm.position_table
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place].ids)):
        padded = -(-len(rows[place].ids) // LENGTH_STEP) * LENGTH_STEP
        if table is not None:
            padded = min(padded, table.rows)
        by_length.setdefault(padded, []).append(place)
    return by_length


def _batch_size(length: int, rows: int) -> tuple[int, int]:
    """Rows in a batch of this length, and in all batches together, which are of one size."""
    size = max(1, min(rows, TOKENS_AT_A_TIME // length))
    return size, -(-rows // size) * size


def _hidden_bytes(lm: CausalLM, by_length: Mapping[int, Sequence[int]]) -> int:
    tokens = sum(length * _batch_size(length, len(places))[1] for length, places in by_length.items())
    return tokens * lm.hidden_size * lm.dtype.itemsize


def _log_probability(lm: CausalLM, hidden_TH: Tensor, row: Row) -> float:
    end = len(row.ids) - 1
    targets = torch.tensor(row.ids[-row.scored :], device=lm.device)
    total = torch.zeros((), dtype=torch.float64, device=lm.device)
    scored_TH = hidden_TH[end - row.scored : end]
    for part in lm.head_chunks(row.scored):
        logits = lm.head(scored_TH[None, part])[0].float()
        total -= functional.cross_entropy(logits, targets[part], reduction="sum").double()
    return total.item()
