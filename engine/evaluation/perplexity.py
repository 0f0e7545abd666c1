"""Perplexity on non-overlapping windows, one decoder block in memory at a time.

The text is cut into windows of ``T`` tokens that share nothing. In each, ``T - 1`` tokens are predicted from
what precedes them in the window, and with ``N`` windows::

    perplexity = exp( sum of -log p(token | window so far) / (N * (T - 1)) )

Windows that begin with a begin-of-text token predict every token of the text; one that begins with several
such tokens predicts none of them.

A model too large for the device is still evaluated, because the order of the loops is turned around: all
windows are embedded, then every block is loaded once and carries all windows one block further. What must fit
is one block and the hidden states (``N * T * hidden`` numbers), which lie in an activation store: on the
device, in host memory, or on disk.

The logits of a window are ``T * vocabulary`` numbers, for large vocabularies more than everything else
together, so the head runs on chunks of tokens. Sums are kept in float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.config.runtime import StoreKind
from engine.data.activations import ActivationStore, make_store
from engine.data.prefetch import READ_AHEAD, InPlace
from engine.errors import DataError
from engine.models.ahead import one_ahead
from engine.quant.packed import unpacked

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

T = TypeVar("T")
NO_LABEL = -100
"""In the place of a token that nothing predicts."""


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts a text."""

    perplexity: float
    nll_mean: float
    """Mean negative log-likelihood of a token, in nats."""
    tokens: int
    """Tokens predicted: windows times (length - given)."""
    seconds: float
    window_nll: tuple[float, ...] = ()
    """Mean negative log-likelihood of a token of each window, in nats."""

    def of_part(self, first: int, last: int) -> PerplexityResult:
        """The same of the windows from ``first`` to ``last``, which is not among them: where several texts
        were measured at once, of one of them. All windows are of one length."""
        if (first, last) == (0, len(self.window_nll)):
            return self
        part, count = self.window_nll[first:last], len(self.window_nll)
        mean, share = math.fsum(part) / len(part), len(part) / count
        return PerplexityResult(
            exponential(mean), mean, self.tokens * len(part) // count, self.seconds * share, part
        )

    @classmethod
    def joined(cls, parts: Sequence[PerplexityResult]) -> PerplexityResult:
        """Of all windows, where each of several processes has measured its share: every so-many-th one."""
        windows = interleaved([part.window_nll for part in parts])
        mean = math.fsum(windows) / len(windows)
        tokens, seconds = sum(part.tokens for part in parts), max(part.seconds for part in parts)
        return cls(exponential(mean), mean, tokens, seconds, windows)


def interleaved(parts: Sequence[Sequence[T]]) -> tuple[T, ...]:
    """One of each in turn; the first ones may have one more."""
    return tuple(one for turn in range(len(parts[0])) for part in parts for one in part[turn : turn + 1])


def pass_blocks(
    lm: CausalLM,
    block_for: Callable[[int], nn.Module],
    windows_NT: Tensor,
    batches: Sequence[range],
    store: ActivationStore,
    on_progress: Callable[[int, int], None],
    on_batch: Callable[[], None],
    *,
    positions_NT: Tensor | None = None,
    often: int = 0,
) -> None:
    """Fill ``store`` with the windows' hidden states behind the last block. The callbacks are those of
    :func:`perplexity`; batches of ``often`` windows are many, so that a block may be compiled for them."""
    blocks, windows = one_ahead(block_for, lm.blocks, lm.device), len(windows_NT)

    def positions(rows: range) -> Tensor | None:
        return None if positions_NT is None else positions_NT[rows.start : rows.stop]

    with closing(blocks):
        for batch in batches:
            on_batch()
            ids = windows_NT[batch.start : batch.stop].to(lm.device)
            store.write(batch.start, lm.embed(ids, positions(batch)))
        for index, block in blocks:
            with unpacked(block, store.dtype), InPlace(store) as carried:
                for number, batch in enumerate(batches, 1):
                    on_batch()
                    hidden = carried.read(batch, batches[number : number + READ_AHEAD])
                    output = lm.run_block(
                        block, index, hidden, often=len(batch) == often, positions_BT=positions(batch)
                    )
                    carried.write(batch.start, output)
                    on_progress(index * windows + batch.stop, (lm.blocks + 1) * windows)
            del block  # before the next one is made


def perplexity(
    lm: CausalLM,
    block_for: Callable[[int], nn.Module],
    windows_NT: Tensor,
    *,
    given: int = 1,
    batch_size: int = 1,
    store_kind: StoreKind = "device",
    store_path: Path | None = None,
    store_budget_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] = lambda done, all: None,
    on_batch: Callable[[], None] = lambda: None,
) -> PerplexityResult:
    """Perplexity of the model whose ``i``-th block is ``block_for(i)``.

    ``windows_NT`` holds token ids, one window a row, of which the first ``given`` are predicted by nothing.
    ``dtype`` is what the hidden states are kept in between blocks; none takes the model's own.
    ``on_progress(done, all)`` counts windows that have passed a block or the head; ``on_batch()`` is called
    before each batch. What they raise ends the evaluation.
    """
    windows, length = windows_NT.shape
    if windows == 0 or length <= given:
        raise DataError(f"{windows} windows of {length} tokens leave nothing to predict", where="evaluation")
    begin = time.monotonic()
    starts = range(0, windows, batch_size)
    batches = [range(start, min(start + batch_size, windows)) for start in starts]
    shape = (windows, length, lm.hidden_size)
    store = make_store(store_kind, shape, dtype or lm.dtype, lm.device, store_path, store_budget_bytes)
    total = torch.zeros((), dtype=torch.float64, device=lm.device)
    each: list[Tensor] = []
    # Not inference_mode: threads write into these tensors.
    with store, torch.no_grad():
        pass_blocks(lm, block_for, windows_NT, batches, store, on_progress, on_batch, often=batch_size)
        for batch in batches:
            on_batch()
            rows = slice(batch.start, batch.stop)
            often = len(batch) == batch_size
            nll_BT = token_nll(lm, store.read(rows), windows_NT[rows], often=often)[:, given - 1 :]
            total += nll_BT.sum()
            each.append(nll_BT.mean(1))
            on_progress(lm.blocks * windows + batch.stop, (lm.blocks + 1) * windows)
    tokens = windows * (length - given)
    mean = total.item() / tokens
    of_windows = tuple(torch.cat(each).tolist())
    return PerplexityResult(exponential(mean), mean, tokens, time.monotonic() - begin, of_windows)


def token_nll(lm: CausalLM, hidden_BTH: Tensor, ids_BT: Tensor, *, often: bool = False) -> Tensor:
    """-log p of each token after the first, float64 ``[B, T-1]``, from the last block's output.

    ``often`` says that many batches of this shape come.
    """
    ids_BT = ids_BT.long()
    labels_BT = torch.full_like(ids_BT, NO_LABEL)
    labels_BT[:, :-1] = ids_BT[:, 1:]
    labels_T, hidden_TH = labels_BT.flatten().to(lm.device), hidden_BTH.flatten(0, 1)
    parts = [
        _nll(lm, hidden_TH[part], labels_T[part], often=often) for part in lm.head_chunks(len(hidden_TH))
    ]
    return torch.cat(parts).view(ids_BT.shape)[:, :-1].double()


def _nll(lm: CausalLM, hidden_TH: Tensor, labels_T: Tensor, *, often: bool) -> Tensor:
    if lm.tail is None:
        return logits_nll(lm.head(hidden_TH[None])[0], labels_T)
    function = lm.repeated(tail_nll) if often else tail_nll
    return function(*lm.tail, hidden_TH.to(lm.dtype), labels_T)


def tail_nll(norm: nn.Module, output: nn.Module, hidden_TH: Tensor, labels_T: Tensor) -> Tensor:
    """-log p of ``labels``, float32 ``[T]`` (0 where there is none), for models that end with a norm and the
    output embeddings: in one piece, so that it can be compiled."""
    return logits_nll(output(norm(hidden_TH)), labels_T)


def logits_nll(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """The same from logits."""
    return functional.cross_entropy(logits_TV.float(), labels_T, reduction="none", ignore_index=NO_LABEL)


def exponential(nll: float) -> float:
    """exp, with infinity where it overflows: an untrained 2-bit model can be that bad."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
