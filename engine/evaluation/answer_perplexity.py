"""Perplexity of the answers of conversations: how well a model would have given them.

The order of loops is that of :mod:`engine.evaluation.perplexity`: a block is loaded once and carries all
windows one block further. Only answer tokens are predicted, and the mean is over all of them, so that a
long answer counts for more than a short one::

    answer perplexity = exp( sum of -log p(token | conversation so far) / answer tokens )
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.config.runtime import StoreKind
from engine.data.activations import make_store
from engine.data.packing import Answers
from engine.data.prefetch import READ_AHEAD, InPlace
from engine.evaluation.perplexity import exponential, logits_nll
from engine.models.ahead import one_ahead
from engine.quant.packed import unpacked

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM


def answer_perplexity(
    lm: CausalLM,
    block_for: Callable[[int], nn.Module],
    windows_NT: Tensor,
    answers: Answers,
    *,
    batch_size: int = 1,
    store_kind: StoreKind = "device",
    store_path: Path | None = None,
    store_budget_bytes: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, all: None,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Perplexity of the answers under the model whose ``i``-th block is ``block_for(i)``, and how many tokens
    they have. The callbacks are those of :func:`~engine.evaluation.perplexity.perplexity`."""
    windows, length = windows_NT.shape
    batches = [range(begin, min(begin + batch_size, windows)) for begin in range(0, windows, batch_size)]
    shape = (windows, length, lm.hidden_size)
    store = make_store(store_kind, shape, lm.dtype, lm.device, store_path, store_budget_bytes)
    blocks, all_steps = one_ahead(block_for, lm.blocks, lm.device), (lm.blocks + 1) * windows

    def positions(rows: range) -> Tensor | None:
        found = answers.positions_NT
        return None if found is None else found[rows.start : rows.stop]

    total = 0.0
    with store, closing(blocks), torch.no_grad():
        for batch in batches:
            on_batch()
            ids = windows_NT[batch.start : batch.stop].to(lm.device)
            store.write(batch.start, lm.embed(ids, positions(batch)))
        for index, block in blocks:
            with unpacked(block, store.dtype), InPlace(store) as carried:
                for number, batch in enumerate(batches, 1):
                    on_batch()
                    hidden = carried.read(batch, batches[number : number + READ_AHEAD])
                    output = lm.run_block(block, index, hidden, positions_BT=positions(batch))
                    carried.write(batch.start, output)
                    on_progress(index * windows + batch.stop, all_steps)
            del block  # before the next one is made
        for batch in batches:
            on_batch()
            rows = slice(batch.start, batch.stop)
            total += _nll(lm, store.read(rows), windows_NT[rows], answers[rows])
            on_progress(lm.blocks * windows + batch.stop, all_steps)
    tokens = int(answers.counts_N.sum())
    return exponential(total / tokens), tokens


def _nll(lm: CausalLM, hidden_BTH: Tensor, ids_BT: Tensor, answers: Answers) -> float:
    """-log p of all answer tokens together, from the last block's output."""
    predicts_BT = answers.predicts_NT
    labels_A = ids_BT.roll(-1, 1)[predicts_BT].long().to(lm.device)
    hidden_AH = hidden_BTH[predicts_BT.to(lm.device)]
    total = 0.0
    for part in lm.head_chunks(len(hidden_AH)):
        nll_A = logits_nll(lm.head(hidden_AH[part][None])[0], labels_A[part])
        total += nll_A.double().sum().item()
    return total
