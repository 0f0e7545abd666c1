"""A quantized model beside full precision, streamed block by block: the numbers of a plain computation with
the whole models."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_perplexity import plain_perplexity, saved, windows
from torch import Tensor, nn

from engine.errors import DataError, StopRequested
from engine.evaluation.beside import Beside, Version, beside, compared
from engine.evaluation.measurement import Measurement
from engine.evaluation.perplexity import perplexity
from engine.models.causal_lm import CausalLM


def worse(lm: Any, index: int) -> nn.Module:
    """A block whose weights are rounded coarsely."""
    block = lm.load_block(index)
    for parameter in block.parameters():
        if parameter.ndim == 2:
            parameter.data = (parameter.data * 8).round() / 8
    return block


def whole(model: Any, lm: Any) -> Any:
    """The same in the whole model, which it changes."""
    for index, block in enumerate(model.model.layers):
        block.load_state_dict(worse(lm, index).state_dict())
    return model


def plain(full: Any, other: Any, ids_NT: Tensor) -> dict[str, Any]:
    """By the definitions, with the whole models and in float64."""
    errors, kl, top1, largest = [], [], [], []
    with torch.no_grad():
        for ids in ids_NT.long():
            one, two = (model(ids[None], output_hidden_states=True) for model in (full, other))
            z, y = (out.logits[0, :-1].double() for out in (one, two))
            p, q = z.softmax(-1), y.softmax(-1)
            kl.append((p * (p.log() - q.log())).sum(-1))
            top1.append((z.argmax(-1) == y.argmax(-1)).double())
            largest.append((z - y).abs().amax(-1))
            # The last of these is behind the final norm.
            states = zip(one.hidden_states[1:-1], two.hidden_states[1:-1], strict=True)
            errors.append([((b - a).norm(dim=-1) / a.norm(dim=-1)).mean().item() for a, b in states])
    return {
        "kl": torch.cat(kl).mean().item(),
        "top1": torch.cat(top1).mean().item(),
        "logit_error": torch.cat(largest).mean().item(),
        "largest_logit_error": torch.cat(largest).max().item(),
        "errors": torch.tensor(errors).mean(0).tolist(),
    }


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("gemma2", {"head_dim": 16, "sliding_window": 8}),
    ],
)
def test_streaming_gives_the_divergence_of_the_whole_models(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    full, lm = saved(tmp_path / "one", model_type, **changes)
    again, _ = saved(tmp_path / "two", model_type, **changes)
    other = whole(again, lm)
    if model_type == "gemma2":
        full.set_attn_implementation("eager")
        other.set_attn_implementation("eager")
    found = beside(Version(lm, lm.load_block), Version(lm, lambda i: worse(lm, i)), windows(), batch_size=2)
    want = plain(full, other, windows())
    got = found.divergence()
    assert got.kl > 1e-3
    assert 0 < got.top1 < 1
    for name in ("kl", "top1", "logit_error", "largest_logit_error"):
        assert getattr(got, name) == pytest.approx(want[name], rel=1e-4), name
    assert list(found.block_errors()[:-1]) == pytest.approx(want["errors"], rel=1e-4)
    assert found.full.perplexity == pytest.approx(plain_perplexity(full, windows()), rel=1e-5)
    assert found.other.perplexity == pytest.approx(plain_perplexity(other, windows()), rel=1e-5)
    assert found.other.tokens == 5 * 32


def test_a_part_of_the_windows_is_what_it_is_alone(tmp_path: Path) -> None:
    _, lm = saved(tmp_path, "llama")

    def read(some: Tensor, **options: Any) -> Beside:
        return beside(Version(lm, lm.load_block), Version(lm, lambda i: worse(lm, i)), some, **options)

    both, alone = read(windows(), batch_size=2), read(windows()[3:])
    assert both.divergence(3, 5).kl == pytest.approx(alone.divergence().kl, rel=1e-5)
    assert both.divergence(3, 5).largest_logit_error == pytest.approx(
        alone.divergence().largest_logit_error, rel=1e-5
    )
    assert both.block_errors(3, 5) == pytest.approx(alone.block_errors(), rel=1e-5)
    assert both.other.of_part(3, 5).perplexity == pytest.approx(alone.other.perplexity, rel=1e-6)
    assert both.other.of_part(3, 5).tokens == alone.other.tokens
    plainly = perplexity(lm, lambda i: worse(lm, i), windows())
    assert both.other.perplexity == pytest.approx(plainly.perplexity, rel=1e-6)
    given = read(windows(), given=3)
    assert given.other.tokens == 5 * 30
    assert given.other.perplexity == pytest.approx(
        perplexity(lm, lambda i: worse(lm, i), windows(), given=3).perplexity, rel=1e-6
    )


def test_shares_of_the_windows_make_up_the_whole(tmp_path: Path) -> None:
    """As several processes read them: every second one each."""
    _, lm = saved(tmp_path, "llama")
    both = Version(lm, lm.load_block), Version(lm, lambda i: worse(lm, i))
    parts = (slice(None), slice(0, None, 2), slice(1, None, 2))
    found = [beside(*both, windows()[rows]) for rows in parts]
    whole, *shares = (Measurement(one.other, one) for one in found)
    joined = Measurement.joined(shares)
    assert joined.result.window_nll == pytest.approx(whole.result.window_nll, rel=1e-5)
    assert joined.result.perplexity == pytest.approx(whole.result.perplexity, rel=1e-6)
    assert joined.result.tokens == whole.result.tokens
    assert joined.block_errors(1, 4) == pytest.approx(whole.block_errors(1, 4), rel=1e-4)
    one, other = joined.divergence(1, 4), whole.divergence(1, 4)
    assert one is not None
    assert other is not None
    assert one.kl == pytest.approx(other.kl, rel=1e-4)
    alone = Measurement.joined([Measurement(share.result) for share in shares])
    assert alone.beside is None
    assert alone.result == joined.result


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_where_the_streams_lie_and_how_the_head_is_cut_do_not_matter(tmp_path: Path, kind: Any) -> None:
    _, lm = saved(tmp_path / "m", "llama")
    both = Version(lm, lm.load_block), Version(lm, lambda i: worse(lm, i))
    want = beside(*both, windows(), batch_size=2)
    paths = (tmp_path / "a.bin", tmp_path / "b.bin") if kind == "disk" else (None, None)
    got = beside(*both, windows(), batch_size=2, store_kind=kind, store_paths=paths)
    assert got.windows == want.windows
    assert got.window_errors == want.window_errors
    assert not list(tmp_path.glob("*.bin"))
    lm.head_values = 7 * 300
    cut = beside(*both, windows(), batch_size=2)
    assert cut.divergence().kl == pytest.approx(want.divergence().kl, rel=1e-5)


def test_a_model_beside_itself_diverges_by_nothing(tmp_path: Path) -> None:
    _, lm = saved(tmp_path, "llama")
    found = beside(Version(lm, lm.load_block), Version(lm, lm.load_block), windows())
    assert found.divergence().kl == 0
    assert found.divergence().top1 == 1
    assert found.divergence().largest_logit_error == 0
    assert found.block_errors() == (0, 0, 0)


def test_values_around_the_blocks_are_those_of_each_version(tmp_path: Path) -> None:
    """A head that is rounded changes what follows the blocks, and nothing before."""
    _, lm = saved(tmp_path, "llama")
    head = lm.model.get_output_embeddings().weight

    @contextmanager
    def rounded() -> Any:
        before = head.data
        head.data = (before * 4).round() / 4
        yield
        head.data = before

    found = beside(Version(lm, lm.load_block), Version(lm, lm.load_block, rounded), windows())
    assert found.block_errors() == (0, 0, 0)
    assert found.divergence().kl > 1e-4
    assert found.full.perplexity == pytest.approx(perplexity(lm, lm.load_block, windows()).perplexity)
    with rounded():
        assert found.other.perplexity == pytest.approx(perplexity(lm, lm.load_block, windows()).perplexity)


def test_tokens_that_a_model_rules_out_make_no_nan() -> None:
    full = torch.tensor([[1.0, 2.0, -math.inf]])
    other = torch.tensor([[1.5, 1.0, -math.inf]])
    _, _, kl, top1, error = compared(full.clone(), other.clone(), torch.tensor([0]))[:, 0].tolist()
    p, q = full[0, :2].softmax(0), other[0, :2].softmax(0)
    assert kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-6)
    assert (top1, error) == (0, 1)


def test_what_is_no_number_is_not_told_as_no_difference() -> None:
    broken, sound = torch.tensor([[math.nan, 1.0]]), torch.tensor([[0.5, 1.0]])
    for full, other in ((broken, sound), (sound, broken)):
        _, _, kl, _, error = compared(full.clone(), other.clone(), torch.tensor([0]))[:, 0].tolist()
        assert math.isnan(kl)
        assert math.isnan(error)


def test_progress_reaches_its_end_and_a_stop_is_heard(tmp_path: Path) -> None:
    _, lm = saved(tmp_path, "llama")
    both = Version(lm, lm.load_block), Version(lm, lm.load_block)
    seen: list[tuple[int, int]] = []
    beside(*both, windows(), batch_size=2, on_progress=lambda done, of: seen.append((done, of)))
    assert seen == sorted(seen)
    assert seen[-1] == (35, 35)

    def stop() -> None:
        if len(seen) > 30:
            raise StopRequested(abort=False)
        seen.append((0, 0))

    with pytest.raises(StopRequested):
        beside(*both, windows(), batch_size=1, on_batch=stop)


def test_windows_without_a_prediction_are_refused(tmp_path: Path) -> None:
    _, lm = saved(tmp_path, "llama")
    with pytest.raises(DataError, match="nothing to predict"):
        beside(Version(lm, lm.load_block), Version(lm, lm.load_block), windows(3, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["device", "host", "disk"])
def test_a_gpu_gives_the_numbers_of_the_cpu(tmp_path: Path, kind: Any) -> None:
    _, lm = saved(tmp_path / "m", "llama")
    want = beside(Version(lm, lm.load_block), Version(lm, lambda i: worse(lm, i)), windows())
    on_gpu = CausalLM(lm.source, torch.device("cuda"), torch.float32)
    both = Version(on_gpu, on_gpu.load_block), Version(on_gpu, lambda i: worse(on_gpu, i))
    paths = (tmp_path / "a", tmp_path / "b")
    got = beside(*both, windows(), batch_size=2, store_kind=kind, store_paths=paths)
    assert got.divergence().kl == pytest.approx(want.divergence().kl, rel=1e-3)
    assert got.block_errors() == pytest.approx(want.block_errors(), rel=1e-3)
    assert got.other.perplexity == pytest.approx(want.other.perplexity, rel=1e-4)
