"""Perplexity of the answers of conversations: how well a model would have given them.

The order of loops is that of :mod:`engine.evaluation.perplexity`: a block is loaded once and carries all
windows one block further. Only answer tokens are predicted, and the mean is over all of them, so that a
long answer counts for more than a short one::

    answer perplexity = exp( sum of -log p(token | conversation so far) / answer tokens )
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.config.runtime import StoreKind
from engine.data.activations import make_store
from engine.data.packing import Answers
from engine.evaluation.perplexity import exponential, logits_nll, pass_blocks

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
    total = 0.0
    with store, torch.no_grad():
        pass_blocks(
            lm,
            block_for,
            windows_NT,
            batches,
            store,
            on_progress,
            on_batch,
            positions_NT=answers.positions_NT,
        )
        for batch in batches:
            on_batch()
            rows = slice(batch.start, batch.stop)
            total += _nll(lm, store.read(rows), windows_NT[rows], answers[rows])
            on_progress(lm.blocks * windows + batch.stop, (lm.blocks + 1) * windows)
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
