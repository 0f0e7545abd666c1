"""Two models' logits compared by a kernel, against double precision and torch's own operations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_beside import worse
from test_perplexity import saved, windows
from torch import Tensor

pytest.importorskip("triton")

from engine.config.model import ModelConfig
from engine.evaluation import compare_kernel
from engine.evaluation.beside import Comparison, Version, beside
from engine.evaluation.beside import compared as plainly
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
pytestmark = [] if DEVICE.type == "cuda" else [pytest.mark.usefixtures("interpreted")]


def made(
    tokens: int, width: int, dtype: torch.dtype, seed: int, spread: float = 4.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of full precision, of another model, and labels."""
    generator = torch.Generator().manual_seed(seed)
    full = spread * torch.randn(tokens, width, generator=generator)
    other = full + 0.3 * spread * torch.randn(tokens, width, generator=generator)
    labels = torch.randint(0, width, (tokens,), generator=generator)
    labels[-1] = width - 1
    return full.to(DEVICE, dtype), other.to(DEVICE, dtype), labels.to(DEVICE)


def reference(full: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """By the definitions, in double precision."""
    full, other = full.double(), other.double()
    p, q = full.log_softmax(-1), other.log_softmax(-1)
    rows = torch.arange(len(labels), device=labels.device)
    # Of equal ones numpy takes the first.
    likeliest = [logits.cpu().numpy().argmax(-1) for logits in (full, other)]
    agrees = torch.from_numpy(likeliest[0] == likeliest[1]).to(full)
    kl = (p.exp() * (p - q)).sum(-1)
    return torch.stack([-p[rows, labels], -q[rows, labels], kl, agrees, (full - other).abs().amax(-1)])


@pytest.mark.parametrize("columns", [16, 64])
@pytest.mark.parametrize(("tokens", "width"), [(1, 2), (3, 16), (5, 61), (4, 200), (2, 1000)])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spread", [0.5, 20.0])
def test_it_is_what_the_definitions_say(
    monkeypatch: pytest.MonkeyPatch, columns: int, tokens: int, width: int, dtype: torch.dtype, spread: float
) -> None:
    monkeypatch.setattr(compare_kernel, "COLUMNS", columns)
    given = made(tokens, width, dtype, tokens * width, spread)
    found = compare_kernel.compared(*given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference(*given), rtol=1e-5, atol=2e-5 * spread)
    torch.testing.assert_close(found, plainly(*given), rtol=1e-5, atol=2e-5 * spread)


@pytest.mark.parametrize("columns", [16, 64])
def test_of_equally_likely_tokens_the_first_counts(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(compare_kernel, "COLUMNS", columns)
    full = torch.zeros(3, 50, device=DEVICE)
    other = torch.zeros(3, 50, device=DEVICE)
    full[0, [7, 40]] = other[0, [7, 33]] = 1.0
    full[1, [8, 40]] = other[1, [7, 40]] = 1.0
    found = compare_kernel.compared(full, other, torch.zeros(3, dtype=torch.int64, device=DEVICE))
    assert found[3].tolist() == [1, 0, 1]
    assert found[2, 2] == 0


def test_what_a_view_shows_is_read() -> None:
    full, other, labels = made(6, 40, torch.float32, 3)
    found = compare_kernel.compared(full[::2, :30], other.t()[:30].t()[::2], labels[::2] % 30)
    torch.testing.assert_close(
        found.double(), reference(full[::2, :30], other[::2, :30], labels[::2] % 30), rtol=1e-5, atol=1e-4
    )


def test_tokens_that_a_model_rules_out_make_no_nan() -> None:
    full, other, labels = made(4, 70, torch.float32, 5)
    labels[labels == 3] = 4
    full[:, 3] = other[:, 3] = -math.inf  # in both, as a padded vocabulary is
    full[:2, 9] = -math.inf  # in full precision alone
    labels[labels == 9] = 8
    found = compare_kernel.compared(full, other, labels)
    torch.testing.assert_close(found, plainly(full, other, labels), rtol=1e-5, atol=1e-5)
    assert found[2].isfinite().all()
    assert found[4].isinf().tolist() == [True, True, False, False]
    other[0, 20] = -math.inf  # in the other alone, and there it is infinitely wrong
    assert compare_kernel.compared(full, other, labels)[2].isinf().tolist() == [True, False, False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("place", [0, 20, 69])
def test_what_is_no_number_is_not_told_as_no_difference(bad: float, whose: int, place: int) -> None:
    given = made(3, 70, torch.float32, 6)
    given[2].fill_(5)
    sound = compare_kernel.compared(*given)
    given[whose][1, place] = bad
    found = compare_kernel.compared(*given)
    assert not found[whose, 1].isfinite()
    assert found[2, 1].isnan()
    assert not found[4, 1].isfinite()
    assert torch.equal(found[:, [0, 2]], sound[:, [0, 2]])


def test_a_model_is_read_beside_full_precision_with_it_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "llama")
    lm = CausalLM(ModelSource.open(ModelConfig(source=str(tmp_path))), DEVICE, torch.float32)
    lm.head_values = 3 * lm.vocab_size  # so that the last chunk is not of the usual size
    both = Version(lm, lm.load_block), Version(lm, lambda index: worse(lm, index))
    monkeypatch.setattr(Comparison, "kernel", None)
    monkeypatch.setattr(Comparison, "device_type", "")
    plain = beside(*both, windows(), batch_size=2)
    seen = []

    def watched(*given: Tensor) -> Tensor:
        seen.append(len(given[0]))
        return compare_kernel.compared(*given)

    monkeypatch.setattr(Comparison, "kernel", watched)
    monkeypatch.setattr(Comparison, "device_type", lm.device.type)
    found = beside(*both, windows(), batch_size=2)
    assert set(seen) == {1, 2, 3}
    for name in ("kl", "top1", "logit_error", "largest_logit_error"):
        assert getattr(found.divergence(), name) == pytest.approx(getattr(plain.divergence(), name), rel=1e-5)
    assert found.other.perplexity == pytest.approx(plain.other.perplexity, rel=1e-6)
    assert found.full.perplexity == pytest.approx(plain.full.perplexity, rel=1e-6)


def test_a_kernel_that_does_not_work_leaves_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(device: torch.device, dtype: torch.dtype) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(compare_kernel, "try_out", failing)
    monkeypatch.setattr(Comparison, "kernel", None)
    with pytest.raises(RuntimeError, match="C compiler"):
        Comparison.switch_on(DEVICE)
    assert Comparison.on(DEVICE) == (plainly, 4)


def test_another_device_than_it_was_tried_on_takes_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparison, "kernel", None)
    monkeypatch.setattr(Comparison, "device_type", "")
    Comparison.switch_on(DEVICE)
    assert Comparison.on(DEVICE) == (compare_kernel.compared, 1)
    assert Comparison.on(torch.device("meta")) == (plainly, 4)
