"""How far a quantized model is from full precision: both read the same text, block by block side by side.

Perplexity says how well a model predicts one text; two models may be equally good at it and predict different
things. What was lost in quantizing shows in the predictions themselves. At every position with the logits
``z`` and the distributions ``p`` of the two models::

    KL           sum over the vocabulary of p_full * (log p_full - log p_other), in nats; its mean
    agreement    the share of positions where both find the same token likeliest
    logit error  max over the vocabulary of |z_full - z_other|; the largest, and the mean over positions

The positions are those that perplexity counts. Behind each block, the error of the hidden states ``h`` says
where along the network it arises: the mean over all tokens of ``|h_other - h_full| / |h_full|``.

Nothing of it needs more than perplexity does, but for a second stream of hidden states: the original block
carries its stream one block further, then the other one its own, and each batch is compared on the way. The
logits of both models are computed for the same few tokens and dropped. It costs another pass of the original
model, which gives the perplexity of full precision on this text as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.config.runtime import StoreKind
from engine.data.activations import ActivationStore, make_store
from engine.data.prefetch import READ_AHEAD, InPlace
from engine.errors import DataError
from engine.evaluation.perplexity import PerplexityResult, exponential, interleaved
from engine.models.ahead import one_ahead
from engine.quant.packed import unpacked

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

LOGITS_AT_ONCE = 4
"""Tensors of all logits of a chunk that live at the same time, compared with the one of perplexity; a kernel
has none but the two it reads, of half the size."""


Compare = Callable[[Tensor, Tensor, Tensor], Tensor]
"""As :func:`compared`."""


class Comparison:
    """Whether logits on a device are compared by :mod:`engine.evaluation.compare_kernel`."""

    kernel: Compare | None = None
    device_type = ""

    @classmethod
    def switch_on(cls, device: torch.device) -> None:
        """By it from now on; raises what stands in its way (no Triton, no compiler) and leaves it off."""
        from engine.evaluation import compare_kernel

        compare_kernel.try_out(device, torch.bfloat16)
        cls.kernel, cls.device_type = compare_kernel.compared, device.type

    @classmethod
    def on(cls, device: torch.device) -> tuple[Compare, int]:
        """How logits are compared there, and of how many at a time room is needed."""
        if cls.kernel is None or device.type != cls.device_type:
            return compared, LOGITS_AT_ONCE
        return cls.kernel, 1


@dataclass(frozen=True)
class Version:
    """A model that is measured."""

    lm: CausalLM
    block_for: Callable[[int], nn.Module]
    outer: Callable[[], AbstractContextManager[None]] = nullcontext
    """Inside, its embedding, final norm and head have the values that are measured."""


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of one model are from those of another."""

    kl: float
    """Mean over the positions, in nats."""
    top1: float
    """Share of positions with the same likeliest token."""
    logit_error: float
    """Mean over the positions of the largest error there."""
    largest_logit_error: float


@dataclass(frozen=True)
class Beside:
    """What came of reading a text with two models."""

    full: PerplexityResult
    other: PerplexityResult
    window_errors: tuple[tuple[float, ...], ...]
    """Of each window, the relative error of the hidden states behind each block."""
    windows: tuple[Divergence, ...]
    """Of each window."""

    @classmethod
    def joined(cls, parts: Sequence[Beside]) -> Beside:
        """As :meth:`PerplexityResult.joined`."""
        return cls(
            PerplexityResult.joined([part.full for part in parts]),
            PerplexityResult.joined([part.other for part in parts]),
            interleaved([part.window_errors for part in parts]),
            interleaved([part.windows for part in parts]),
        )

    def divergence(self, first: int = 0, last: int | None = None) -> Divergence:
        """Over the windows from ``first`` to ``last``, which is not among them; all are of one length."""
        part = self.windows[first:last]
        return Divergence(
            kl=math.fsum(one.kl for one in part) / len(part),
            top1=math.fsum(one.top1 for one in part) / len(part),
            logit_error=math.fsum(one.logit_error for one in part) / len(part),
            largest_logit_error=_largest([one.largest_logit_error for one in part]),
        )

    def block_errors(self, first: int = 0, last: int | None = None) -> tuple[float, ...]:
        """Relative error behind each block over these windows."""
        part = self.window_errors[first:last]
        return tuple(math.fsum(errors) / len(part) for errors in zip(*part, strict=True))


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def beside(
    full: Version,
    other: Version,
    windows_NT: Tensor,
    *,
    given: int = 1,
    batch_size: int = 1,
    store_kind: StoreKind = "device",
    store_paths: tuple[Path | None, Path | None] = (None, None),
    store_budget_bytes: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, all: None,
    on_batch: Callable[[], None] = lambda: None,
) -> Beside:
    """Both models on the windows ``windows_NT``; the arguments are those of
    :func:`engine.evaluation.perplexity.perplexity`. ``store_paths`` are of the stream of ``full`` and of the
    other's."""
    windows, length = windows_NT.shape
    if windows == 0 or length <= given:
        raise DataError(f"{windows} windows of {length} tokens leave nothing to predict", where="evaluation")
    begin, both, blocks = time.monotonic(), (full, other), full.lm.blocks
    starts = range(0, windows, batch_size)
    batches = [range(start, min(start + batch_size, windows)) for start in starts]
    total = (2 * blocks + 1) * windows
    errors_LN = torch.zeros((blocks, windows), dtype=torch.float64, device=full.lm.device)
    found: list[Tensor] = []
    # Not inference_mode: threads write into these tensors.
    with ExitStack() as stack, torch.no_grad():
        stores = []
        for version, path in zip(both, store_paths, strict=True):
            shape = (windows, length, version.lm.hidden_size)
            device, dtype = version.lm.device, version.lm.dtype
            stores.append(
                stack.enter_context(make_store(store_kind, shape, dtype, device, path, store_budget_bytes))
            )
        for batch in batches:
            on_batch()
            ids_BT = windows_NT[batch.start : batch.stop].to(full.lm.device)
            for version, store in zip(both, stores, strict=True):
                with version.outer():
                    store.write(batch.start, version.lm.embed(ids_BT))

        def block_for(step: int) -> nn.Module:
            return both[step % 2].block_for(step // 2)

        passing = stack.enter_context(closing(one_ahead(block_for, 2 * blocks, full.lm.device)))
        for step, block in passing:
            index, version, store = step // 2, both[step % 2], stores[step % 2]
            with unpacked(block, store.dtype), InPlace(store) as carried:
                for number, batch in enumerate(batches, 1):
                    on_batch()
                    hidden = carried.read(batch, batches[number : number + READ_AHEAD])
                    often = len(batch) == batch_size
                    hidden = version.lm.run_block(block, index, hidden, often=often)
                    carried.write(batch.start, hidden)
                    if step % 2:
                        errors_LN[index, batch.start : batch.stop] = _relative_error(stores[0], batch, hidden)
                    on_progress(step * windows + batch.stop, total)
            del block  # before the next one is made
        for batch in batches:
            on_batch()
            rows = slice(batch.start, batch.stop)
            states = stores[0].read(rows), stores[1].read(rows)
            found.append(_measures(both, states, windows_NT[rows], given))
            on_progress(2 * blocks * windows + batch.stop, total)
    seconds = time.monotonic() - begin
    return _result(torch.cat(found, 1).cpu(), errors_LN.T.cpu(), given, length, seconds)


def _relative_error(full: ActivationStore, batch: range, hidden_BTH: Tensor) -> Tensor:
    """Float64 ``[B]``: the mean over the tokens of each window."""
    full_BTH = full.read(slice(batch.start, batch.stop)).float()
    error_BT = (hidden_BTH.float() - full_BTH).norm(dim=-1)
    return (error_BT / full_BTH.norm(dim=-1).clamp(min=1e-30)).double().mean(1)


MEASURES = ("nll of full precision", "nll", "kl", "top1", "logit error", "largest logit error")


def _measures(
    both: tuple[Version, Version], hidden: tuple[Tensor, Tensor], ids_BT: Tensor, given: int
) -> Tensor:
    """Float64 ``[6, B]``: of each window the mean over its positions of all :data:`MEASURES` but the last,
    and of that the largest."""
    lm, batch = both[0].lm, len(ids_BT)
    flat = [states_BTH[:, given - 1 : -1].flatten(0, 1) for states_BTH in hidden]
    labels_T = ids_BT[:, given:].long().flatten().to(lm.device)
    compare, at_once = Comparison.on(lm.device)
    size = max(1, lm.head_values // (at_once * max(version.lm.vocab_size for version in both)))
    parts = []
    for start in range(0, len(labels_T), size):
        chunk = slice(start, start + size)
        full_TV, other_TV = (_logits(*each, chunk) for each in zip(both, flat, strict=True))
        parts.append(compare(full_TV, other_TV, labels_T[chunk]))
    found_MBP = torch.cat(parts, 1).double().view(len(MEASURES) - 1, batch, -1)
    return torch.cat([found_MBP.mean(2), found_MBP[-1:].amax(2)])


def _logits(version: Version, states_TH: Tensor, chunk: slice) -> Tensor:
    with version.outer():
        return version.lm.head(states_TH[None, chunk])[0]


def compared(full_TV: Tensor, other_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Float32 ``[5, T]``: of each position -log p of its label in both models, the KL divergence, whether
    both find the same token likeliest, and the largest error of a logit."""
    full_TV, other_TV = full_TV.float(), other_TV.float()
    agrees_T = full_TV.argmax(-1) == other_TV.argmax(-1)
    # A token that is impossible in both differs by nothing, while infinity minus infinity is no number.
    error_T = (full_TV - other_TV).abs().masked_fill_(full_TV == other_TV, 0).amax(-1)
    full_TV, other_TV = full_TV.log_softmax(-1), other_TV.log_softmax(-1)
    nll = [-log_TV.gather(-1, labels_T[:, None])[:, 0] for log_TV in (full_TV, other_TV)]
    p_TV = full_TV.exp()
    kl_T = torch.where(p_TV == 0, 0, p_TV * full_TV.sub_(other_TV)).sum(-1)
    return torch.stack([*nll, kl_T.clamp(min=0), agrees_T.float(), error_T])


def _result(found_MN: Tensor, errors_NL: Tensor, given: int, length: int, seconds: float) -> Beside:
    tokens = found_MN.shape[1] * (length - given)

    def perplexity(nll_N: Tensor) -> PerplexityResult:
        mean = nll_N.mean().item()
        return PerplexityResult(exponential(mean), mean, tokens, seconds, tuple(nll_N.tolist()))

    windows = tuple(Divergence(*row) for row in found_MN[2:].T.tolist())
    errors = tuple(map(tuple, errors_NL.tolist()))
    return Beside(perplexity(found_MN[0]), perplexity(found_MN[1]), errors, windows)
