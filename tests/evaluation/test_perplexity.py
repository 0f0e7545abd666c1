"""Perplexity, streamed block by block, is the perplexity of the whole model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config.model import ModelConfig
from engine.errors import DataError, StopRequested
from engine.evaluation.perplexity import perplexity
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource

STORIES = Path(__file__).parents[2].parent / "shared/models/stories260K"
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def saved(directory: Path, model_type: str, **changes: Any) -> tuple[Any, CausalLM]:
    """The whole model as transformers runs it, and the same model streamed."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.ndim == 2 else 1  # far from the uniform prediction
    model.save_pretrained(directory)
    source = ModelSource.open(ModelConfig(source=str(directory)))
    return model, CausalLM(source, torch.device("cpu"), torch.float32)


def windows(count: int = 5, length: int = 33) -> Tensor:
    return torch.randint(0, 300, (count, length), generator=torch.Generator().manual_seed(3)).int()


def plain_perplexity(model: Any, ids_NT: Tensor) -> float:
    """exp of the mean over all predictions, each window on its own."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in ids_NT.long():
            log_p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
            total -= log_p[torch.arange(len(ids) - 1), ids[1:]].sum().item()
            count += len(ids) - 1
    return math.exp(total / count)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("gemma2", {"head_dim": 16, "sliding_window": 8}),
    ],
)
def test_streaming_gives_the_perplexity_of_the_whole_model(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    model, lm = saved(tmp_path, model_type, **changes)
    if model_type == "gemma2":  # fused attention would leave out the soft cap
        model.set_attn_implementation("eager")
    result = perplexity(lm, lm.load_block, windows())
    assert result.perplexity == pytest.approx(plain_perplexity(model, windows()), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll_mean))
    assert result.tokens == 5 * 32


def test_batch_size_and_head_chunks_do_not_matter(tmp_path: Path) -> None:
    _, lm = saved(tmp_path, "llama")
    one = perplexity(lm, lm.load_block, windows(), batch_size=1).nll_mean
    assert perplexity(lm, lm.load_block, windows(), batch_size=2).nll_mean == pytest.approx(one, rel=1e-6)
    lm.head_values = 5 * 300
    assert perplexity(lm, lm.load_block, windows(), batch_size=1).nll_mean == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_where_the_activations_lie_does_not_change_a_bit(tmp_path: Path, kind: Any) -> None:
    _, lm = saved(tmp_path / "m", "llama")
    want = perplexity(lm, lm.load_block, windows(), batch_size=2).nll_mean
    path = tmp_path / "stream" if kind == "disk" else None
    have = perplexity(lm, lm.load_block, windows(), batch_size=2, store_kind=kind, store_path=path)
    assert have.nll_mean == want
    assert not (tmp_path / "stream").exists()


def test_each_block_is_loaded_once_and_progress_is_told(tmp_path: Path) -> None:
    _, lm = saved(tmp_path, "llama")
    asked: list[int] = []
    told: list[tuple[int, int]] = []

    def block_for(index: int) -> nn.Module:
        asked.append(index)
        return lm.load_block(index)

    count = len(windows())
    perplexity(lm, block_for, windows(), on_progress=lambda done, every: told.append((done, every)))
    assert asked == [0, 1, 2]
    # Every window passes three blocks and the head.
    assert told == [(done, 4 * count) for done in range(1, 4 * count + 1)]


def test_a_stop_request_ends_the_evaluation(tmp_path: Path) -> None:
    _, lm = saved(tmp_path, "llama")

    def stop() -> None:
        raise StopRequested

    with pytest.raises(StopRequested):
        perplexity(lm, lm.load_block, windows(), on_batch=stop)


def test_no_windows_is_an_error_not_a_division_by_zero(tmp_path: Path) -> None:
    _, lm = saved(tmp_path, "llama")
    for empty in (windows()[:0], windows()[:, :1]):
        with pytest.raises(DataError, match="nothing to predict"):
            perplexity(lm, lm.load_block, empty)


def test_what_windows_begin_with_is_predicted_by_nothing(tmp_path: Path) -> None:
    model, lm = saved(tmp_path, "llama")
    ids_NT = windows(length=20)
    found = perplexity(lm, lm.load_block, ids_NT, given=3, batch_size=2)
    with torch.no_grad():
        log_p = model(ids_NT.long()).logits[:, 2:-1].double().log_softmax(-1)
    nll = -log_p.gather(-1, ids_NT.long()[:, 3:, None]).mean().item()
    assert found.tokens == 5 * 17
    assert found.nll_mean == pytest.approx(nll, rel=1e-5)
    with pytest.raises(DataError, match="nothing to predict"):
        perplexity(lm, lm.load_block, ids_NT, given=20)


def test_a_hopeless_model_has_a_large_perplexity_not_a_crash(tmp_path: Path) -> None:
    _, lm = saved(tmp_path, "llama", tie_word_embeddings=False)
    lm.model.get_output_embeddings().weight.data *= 1e5
    assert perplexity(lm, lm.load_block, windows()).perplexity == math.inf


@pytest.mark.skipif(not STORIES.exists(), reason="the shared model stories260K is not here")
def test_a_real_model_predicts_a_story_better_than_noise() -> None:
    source = ModelSource.open(ModelConfig(source=str(STORIES)))
    lm = CausalLM(source, torch.device("cpu"), torch.float32)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = source.tokenizer()(text, return_tensors="pt").input_ids
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    story = perplexity(lm, lm.load_block, ids).perplexity
    assert story < 3
    assert perplexity(lm, lm.load_block, shuffled).perplexity > 30
