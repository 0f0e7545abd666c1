"""The loss at the head: in chunks, with and without a teacher, compiled or not, it is that of all logits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from engine.config.model import ModelConfig
from engine.evaluation.perplexity import NO_LABEL
from engine.methods.network.head_loss import HeadLoss, tail_loss
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS = 37


def open_model(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> CausalLM:
    tiny.build(folder / "model", name, num_hidden_layers=1)
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder / "model"))), DEVICE, dtype)


def inputs(lm: CausalLM, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, labels some of which are missing, a teacher's hidden states."""
    generator = torch.Generator().manual_seed(seed)
    hidden, teacher = (torch.randn(TOKENS, lm.hidden_size, generator=generator) * 3 for _ in range(2))
    labels = torch.randint(0, lm.vocab_size, (TOKENS,), generator=generator)
    labels[::7] = NO_LABEL
    return hidden.to(DEVICE), labels.to(DEVICE), teacher.to(DEVICE)


def by_hand(
    lm: CausalLM, hidden_TH: Tensor, labels_T: Tensor, teacher_TH: Tensor | None, text_weight: float = 0.0
) -> Tensor:
    """From the model's own forward behind its last block, all logits at once."""
    logits = lm._forward_head(hidden_TH[None])[0].float().log_softmax(-1)
    kept = labels_T != NO_LABEL
    said = -logits[kept].gather(1, labels_T[kept, None]).sum()
    if teacher_TH is None:
        return said
    target = lm._forward_head(teacher_TH[None])[0].float().log_softmax(-1).detach()
    return (target.exp() * (target - logits)).sum() + text_weight * said


@pytest.mark.parametrize("values", [1, 700, 1 << 25])
@pytest.mark.parametrize(("taught", "text_weight"), [(False, 0.3), (True, 0.0), (True, 0.3)])
@pytest.mark.parametrize("name", ["llama2", "smollm2", "gemma2", "olmo2"])
def test_loss_and_gradient_are_those_of_all_logits(
    tmp_path: Path, name: str, taught: bool, text_weight: float, values: int
) -> None:
    lm = open_model(tmp_path, name)
    assert (lm.tail is None) == (name == "gemma2"), "a cap on the logits is more than norm and embeddings"
    hidden, labels, teacher = inputs(lm)
    teacher_TH = teacher if taught else None
    leaf = hidden.clone().requires_grad_(True)
    expected = by_hand(lm, leaf, labels, teacher_TH, text_weight)
    expected.backward()
    assert leaf.grad is not None

    lm.head_values = values
    head = HeadLoss(lm, text_weight)
    assert torch.allclose(head.value(hidden, labels, teacher_TH), expected, rtol=1e-4)
    loss, gradient = head.gradient(hidden, labels, teacher_TH, 0.25, lambda loss: loss * 8)
    assert torch.allclose(loss, expected / 4, rtol=1e-4)
    assert torch.allclose(gradient, leaf.grad * 2, rtol=1e-3, atol=1e-4 * float(leaf.grad.abs().max()))


@pytest.mark.parametrize(("tokens", "most"), [(37, 1), (37, 5), (37, 37), (37, 100), (16384, 1048), (1, 1)])
def test_chunks_cover_all_tokens_once_and_are_of_one_size_but_for_the_last(
    tmp_path: Path, tokens: int, most: int
) -> None:
    lm = open_model(tmp_path, "llama2")
    lm.head_values = most * lm.vocab_size
    parts = lm.head_chunks(tokens)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(tokens))
    sizes = [part.stop - part.start for part in parts]
    assert len(set(sizes[:-1])) <= 1
    assert 0 < sizes[-1] <= sizes[0] <= most


@pytest.mark.skipif(DEVICE.type == "cpu" and not shutil.which("g++"), reason="needs a compiler")
def test_compiled_it_is_one_piece_and_the_same(tmp_path: Path) -> None:
    lm = open_model(tmp_path, "llama2", torch.bfloat16)
    assert lm.tail is not None
    hidden, labels, teacher = (t.to(torch.bfloat16) if t.is_floating_point() else t for t in inputs(lm))
    whole = torch.compile(tail_loss, fullgraph=True, dynamic=False)
    results = []
    for function in (tail_loss, whole):
        leaf = hidden.clone().requires_grad_(True)
        loss = function(*lm.tail, leaf, labels, teacher, 0.1)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0].float()))
    (plain, slope), (compiled, other) = results
    assert torch.allclose(plain, compiled, rtol=1e-2)
    assert (slope - other).norm() < 2e-2 * slope.norm()
