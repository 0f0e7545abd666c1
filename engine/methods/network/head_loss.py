"""The loss at a language model's head, whose logits never exist as a whole.

A batch of ``T`` tokens has ``T x vocabulary`` logits, for a large vocabulary more than all activations of the
blocks together. So the head works on a chunk of tokens at a time; the gradient of a chunk's loss is taken at
once and kept at the last hidden state, from where it goes through the blocks in one piece.

The teacher costs no second model: only its last hidden states are kept, and the head that turns them into
logits is the student's own, since training reads the original head, also where a run quantizes it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.evaluation.perplexity import NO_LABEL, logits_nll
from engine.gpu.compiled import Compiled
from engine.models.causal_lm import CausalLM


def token_loss(
    logits_TV: Tensor, labels_T: Tensor, teacher_TV: Tensor | None, text_weight: float = 0.0
) -> Tensor:
    """Summed over tokens, float32: cross-entropy to ``labels`` (their successors, -100 where there is none),
    or the Kullback-Leibler divergence to the prediction that ``teacher`` makes, and ``text_weight`` times the
    cross-entropy."""
    if teacher_TV is None:
        return logits_nll(logits_TV, labels_T).sum()
    target = teacher_TV.float().log_softmax(-1)
    predicted = logits_TV.float().log_softmax(-1)
    loss = functional.kl_div(predicted, target, reduction="sum", log_target=True)
    if text_weight:
        loss = loss + text_weight * functional.nll_loss(
            predicted, labels_T, reduction="sum", ignore_index=NO_LABEL
        )
    return loss


def tail_loss(
    norm: nn.Module,
    output: nn.Module,
    hidden_TH: Tensor,
    labels_T: Tensor,
    teacher_TH: Tensor | None,
    text_weight: float = 0.0,
) -> Tensor:
    """The same from hidden states, for models that end with a norm and the output embeddings: in one piece,
    so that it can be compiled."""
    return _loss(lambda hidden: output(norm(hidden)), hidden_TH, labels_T, teacher_TH, text_weight)


def _loss(
    head: Callable[[Tensor], Tensor],
    hidden_TH: Tensor,
    labels_T: Tensor,
    teacher_TH: Tensor | None,
    text_weight: float,
) -> Tensor:
    """The same where ``head`` makes logits ``[T, V]`` of hidden states."""
    teacher_TV = None
    if teacher_TH is not None:
        with torch.no_grad():
            teacher_TV = head(teacher_TH)
    return token_loss(head(hidden_TH), labels_T, teacher_TV, text_weight)


class HeadLoss:
    """The loss of the last block's output; ``text_weight`` is that of :func:`token_loss`."""

    def __init__(self, lm: CausalLM, text_weight: float = 0.0) -> None:
        self.lm, self.text_weight = lm, text_weight
        self._tail: Callable[..., Tensor] = tail_loss
        self._kernel: Callable[..., tuple[Tensor, Tensor]] | None = None

    def take_kernel(self, dtype: torch.dtype) -> None:
        """Let the steps use :mod:`engine.methods.network.head_kernel`, where a norm and the output embeddings
        are all that follows the blocks; raises what stands in its way."""
        if self.lm.tail is not None:
            from engine.methods.network import head_kernel

            head_kernel.try_out(self.lm.device, dtype)
            self._kernel = head_kernel.loss_and_gradient

    def compile(self, *, expect_silence: Callable[[float], None], on_failure: Callable[[str], None]) -> None:
        """Let the steps use a compiled form, where there can be one."""
        self._tail = Compiled(tail_loss, expect_silence=expect_silence, on_failure=on_failure)

    @property
    def compiled(self) -> bool:
        return self._tail is not tail_loss

    def gradient(
        self,
        hidden_TH: Tensor,
        labels_T: Tensor,
        teacher_TH: Tensor | None,
        weight: float,
        scale: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """``weight`` times the summed loss, and the gradient ``[T, H]`` of ``scale`` of that."""
        gradient_TH = torch.empty_like(hidden_TH)
        total = torch.zeros((), device=hidden_TH.device)
        if self._kernel is not None:
            factor = scale(torch.full((), weight, device=hidden_TH.device))
            for part in self.lm.head_chunks(len(hidden_TH)):
                teacher_PH = _part(teacher_TH, part)
                loss, gradient_TH[part] = self._by_kernel(hidden_TH[part], labels_T[part], teacher_PH, factor)
                total += loss * weight
            return total, gradient_TH
        for part in self.lm.head_chunks(len(hidden_TH)):
            # A leaf of its own: a slice's gradient would be as large as the whole, and mostly zeros.
            hidden = hidden_TH[part].detach().requires_grad_(True)
            with torch.enable_grad():
                loss = self._chunk(hidden, labels_T[part], _part(teacher_TH, part), self._tail) * weight
            gradient_TH[part] = torch.autograd.grad(scale(loss), hidden)[0]
            total += loss.detach()
        return total, gradient_TH

    def _by_kernel(
        self, hidden_TH: Tensor, labels_T: Tensor, teacher_TH: Tensor | None, factor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and ``factor`` times its gradient ``[T, H]``."""
        assert self._kernel is not None
        assert self.lm.tail is not None
        norm, output = self.lm.tail
        hidden = hidden_TH.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = output(norm(hidden.to(self.lm.dtype)))
        with torch.no_grad():
            teacher = None if teacher_TH is None else output(norm(teacher_TH.to(self.lm.dtype)))
        loss, gradient = self._kernel(logits.detach(), labels_T, teacher, self.text_weight, factor)
        return loss, torch.autograd.grad(logits, hidden, gradient)[0]

    @torch.no_grad()
    def value(self, hidden_TH: Tensor, labels_T: Tensor, teacher_TH: Tensor | None) -> Tensor:
        """The summed loss alone, by the plain form."""
        total = torch.zeros((), device=hidden_TH.device)
        for part in self.lm.head_chunks(len(hidden_TH)):
            total += self._chunk(hidden_TH[part], labels_T[part], _part(teacher_TH, part), tail_loss)
        return total

    def _chunk(
        self, hidden_TH: Tensor, labels_T: Tensor, teacher_TH: Tensor | None, tail: Callable[..., Tensor]
    ) -> Tensor:
        modules = self.lm.tail
        if modules is not None:
            dtype = self.lm.dtype
            teacher = None if teacher_TH is None else teacher_TH.to(dtype)
            return tail(*modules, hidden_TH.to(dtype), labels_T, teacher, self.text_weight)
        head = self.lm.head
        return _loss(lambda hidden: head(hidden[None])[0], hidden_TH, labels_T, teacher_TH, self.text_weight)


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]
