"""Rows of tokens of any lengths through a model, one decoder block in memory at a time.

As in :mod:`engine.evaluation.perplexity` all rows go through one block before the next is loaded. Rows are
sorted by length and padded at their end to a few common lengths; attention is causal, so nothing that counts
sees the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.config.runtime import StoreKind
from engine.data.activations import ActivationStore, make_store
from engine.models.ahead import one_ahead
from engine.quant.packed import unpacked

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

TOKENS_AT_A_TIME = 2048
"""Of a batch through a block."""
LENGTH_STEP = 32
CPU_MEMORY = 1 << 30
"""Hidden states up to this size stay in host memory where there is no GPU."""
Tokens = Sequence[int]


@torch.no_grad()
def pass_rows(
    lm: CausalLM,
    block_for: Callable[[int], nn.Module],
    rows: Sequence[Tokens],
    heard: Callable[[int, Tensor], None],
    folder: Path | None,
    on_progress: Callable[[int, int], None],
    on_batch: Callable[[], None],
) -> None:
    """Call ``heard(place, hidden_TH)`` for every row, with its hidden states behind the last block and those
    of the padding behind them.

    Hidden states that memory has no room for lie in files in ``folder``. ``on_progress(done, all)``
    counts batches that have passed a block or the head; ``on_batch()`` is called before each. What they raise
    ends it.
    """
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
                heard(place, row_TH)
            on_progress(lm.blocks * len(batches) + number, (lm.blocks + 1) * len(batches))


def rows_bytes(lm: CausalLM, rows: Sequence[Tokens]) -> int:
    """What the hidden states of all rows take, in memory or in files."""
    return _hidden_bytes(lm, _by_length(lm, rows))


def memory_room(device: torch.device) -> int:
    """Bytes of hidden states that stay in memory."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_MEMORY


@dataclass(frozen=True)
class _Batch:
    places: tuple[int, ...]
    """Of the rows in the list."""
    ids_BT: Tensor
    store: ActivationStore
    start: int
    """Where it lies in the store."""


def _batches(lm: CausalLM, rows: Sequence[Tokens], folder: Path | None, stack: ExitStack) -> Iterator[_Batch]:
    """Rows of about the same length together; every batch of a length has the same size."""
    by_length = _by_length(lm, rows)
    needed = _hidden_bytes(lm, by_length)
    kind: StoreKind = "device" if folder is None or needed <= memory_room(lm.device) else "disk"
    for length, places in by_length.items():
        size, count = _batch_size(length, len(places))
        path = None if folder is None else folder / f"tasks-{length}.bin"
        shape = (count, length, lm.hidden_size)
        store = stack.enter_context(make_store(kind, shape, lm.dtype, lm.device, path))
        for start in range(0, len(places), size):
            chosen = tuple(places[start : start + size])
            ids_BT = torch.zeros(size, length, dtype=torch.long)
            for number, place in enumerate(chosen):
                ids_BT[number, : len(rows[place])] = torch.tensor(rows[place])
            yield _Batch(chosen, ids_BT, store, start)


def _by_length(lm: CausalLM, rows: Sequence[Tokens]) -> dict[int, list[int]]:
    """Places of the rows that are padded to each length."""
    by_length: dict[int, list[int]] = {}
    table = lm.position_table
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
        padded = -(-len(rows[place]) // LENGTH_STEP) * LENGTH_STEP
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
