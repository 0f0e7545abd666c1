"""Loss and gradient of a chunk of logits by a kernel, against torch's own operations and double precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quiet import Heard
from torch import Tensor, nn

pytest.importorskip("triton")

from engine.methods.network import head_kernel
from engine.methods.network.head_kernel import loss_and_gradient
from engine.methods.network.head_loss import HeadLoss, token_loss
from engine.methods.network.network import Network, NetworkData

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = (
    [torch.float32, torch.float16, torch.bfloat16]
    if DEVICE.type == "cuda"
    else [torch.float32, torch.float16]
)
pytestmark = [] if DEVICE.type == "cuda" else [pytest.mark.usefixtures("interpreted")]


def made(
    tokens: int, width: int, dtype: torch.dtype, seed: int, spread: float = 4.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which some are none, and the teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (spread * torch.randn(tokens, width, generator=generator) for _ in range(2))
    labels = torch.randint(0, width, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    labels[:1] = -100
    labels[-1:] = width - 1
    return logits.to(DEVICE, dtype), labels.to(DEVICE), teacher.to(DEVICE, dtype)


def reference(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, text_weight: float, factor: float
) -> tuple[Tensor, Tensor]:
    """The plain form in double precision, of the same numbers."""
    leaf = logits.double().requires_grad_(True)
    target = None if teacher is None else teacher.double().log_softmax(-1)
    predicted = leaf.log_softmax(-1)
    valid = labels >= 0
    text = -predicted[torch.arange(len(labels)), labels.clamp(min=0)][valid].sum()
    loss = text if target is None else (target.exp() * (target - predicted)).sum() + text_weight * text
    (gradient,) = torch.autograd.grad(factor * loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("columns", [16, 64])
@pytest.mark.parametrize(("tokens", "width"), [(1, 2), (3, 16), (5, 61), (4, 200), (2, 1000)])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("taught", "text_weight"), [(False, 0.0), (True, 0.0), (True, 0.1), (True, 3.0)])
def test_it_is_the_loss_and_its_gradient(
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    taught: bool,
    text_weight: float,
) -> None:
    monkeypatch.setattr(head_kernel, "COLUMNS", columns)
    logits, labels, teacher = made(tokens, width, dtype, seed=tokens * width + taught)
    given = teacher if taught else None
    factor = torch.tensor(0.37, device=DEVICE)
    loss, gradient = loss_and_gradient(logits, labels, given, text_weight, factor)
    expected, expected_gradient = reference(logits, labels, given, text_weight, 0.37)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-5)
    largest = expected_gradient.abs().max()
    unit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert ((gradient.double() - expected_gradient).abs() <= unit * largest.clamp(min=1e-4)).all()
    plain = token_loss(logits, labels, given, text_weight)
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-4)


def test_logits_far_from_zero_and_impossible_ones_are_no_trouble() -> None:
    logits, labels, teacher = made(4, 70, torch.float32, seed=5, spread=300.0)
    logits[:, 3] = teacher[:, 3] = float("-inf")  # impossible in both, as a padded vocabulary is
    teacher[:, 9] = float("-inf")  # and in the teacher alone
    labels[labels == 3] = 4
    loss, gradient = loss_and_gradient(logits, labels, teacher, 0.1, torch.ones((), device=DEVICE))
    kept = [column for column in range(70) if column != 3]
    moved = torch.where(labels > 3, labels - 1, labels)
    finite = teacher[:, kept].clamp(min=-1e9)
    expected, expected_gradient = reference(logits[:, kept], moved, finite, 0.1, 1.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient[:, kept].double(), expected_gradient, rtol=1e-5, atol=1e-5)
    assert not gradient[:, 3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("whose", ["own", "teacher"])
@pytest.mark.parametrize("place", [0, 20, 69])
def test_what_is_no_number_is_not_hidden(bad: float, whose: str, place: int) -> None:
    """A step is skipped by it; a kernel that took the largest of the rest would train on nonsense."""
    logits, labels, teacher = made(3, 70, torch.float32, seed=6)
    (logits if whose == "own" else teacher)[1, place] = bad
    loss, gradient = loss_and_gradient(logits, labels, teacher, 0.1, torch.ones((), device=DEVICE))
    assert not torch.isfinite(loss)
    assert not torch.isfinite(gradient[1]).all()
    assert torch.isfinite(gradient[[0, 2]]).all()


def head(width: int, hidden: int, chunk: int) -> Any:
    """As much of a model as a head needs, whose logits are made of so many tokens at a time."""
    torch.manual_seed(0)
    norm, output = nn.RMSNorm(hidden).to(DEVICE), nn.Linear(hidden, width, bias=False).to(DEVICE)
    for parameter in (*norm.parameters(), *output.parameters()):
        parameter.requires_grad_(False)

    def chunks(tokens: int) -> list[slice]:
        return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]

    return SimpleNamespace(tail=(norm, output), dtype=torch.float32, device=DEVICE, head_chunks=chunks)


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_a_head_gives_the_hidden_states_the_same_gradient(taught: bool, scale: float) -> None:
    lm = head(width=83, hidden=24, chunk=5)
    generator = torch.Generator().manual_seed(1)
    hidden, teacher = (torch.randn(13, 24, generator=generator).to(DEVICE) for _ in range(2))
    labels = torch.randint(0, 83, (13,), generator=generator).to(DEVICE)
    labels[[4, 12]] = -100
    plain, fast = HeadLoss(lm, 0.1), HeadLoss(lm, 0.1)
    fast.take_kernel(torch.float32)
    given = teacher if taught else None
    found = [each.gradient(hidden, labels, given, 0.25, lambda one: scale * one) for each in (plain, fast)]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6 * scale)
    assert not fast._tail is not plain._tail


def test_a_model_with_more_behind_its_norm_takes_none() -> None:
    lm = head(width=8, hidden=4, chunk=5)
    lm.tail = None
    loss = HeadLoss(lm)
    loss.take_kernel(torch.float32)
    assert loss._kernel is None


def plain_network() -> Network:
    """Of no block."""
    lm: Any = head(width=8, hidden=4, chunk=5)
    return Network(lm, [], NetworkData(torch.zeros(1, 4, dtype=torch.int64), 1, None), torch.float32)


@pytest.mark.parametrize("compiles", [False, True])
def test_the_kernels_are_tried_only_where_steps_use_them(
    compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(head_kernel, "try_out", lambda device, dtype: tried.append(dtype))
    network, heard = plain_network(), Heard()
    network.hasten(heard, "here", compiles=compiles, records=True)
    assert tried == ([] if compiles else [torch.float32])
    assert (network.head._kernel is None) is compiles
    assert not heard.warnings


@pytest.mark.parametrize("records", [False, True])
def test_steps_that_are_recorded_do_without_kernels_that_fail(
    records: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device, dtype: torch.dtype) -> None:
        raise ValueError("no such instruction")

    monkeypatch.setattr(head_kernel, "try_out", broken)
    network, heard = plain_network(), Heard()
    network.hasten(heard, "here", compiles=False, records=records)
    assert network.head._kernel is None
    assert len(heard.warnings) == records
    assert all("no such instruction" in said for _, said in heard.warnings)


def test_a_want_of_memory_is_left_to_whoever_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device, dtype: torch.dtype) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(head_kernel, "try_out", full)
    with pytest.raises(torch.OutOfMemoryError):
        plain_network().hasten(Heard(), "here", compiles=False, records=True)
