"""Many documents at once, in places made beforehand: the very logits of the model, and samples of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3Config,
)

from engine.evaluation import writing
from engine.evaluation.writing import PIECE, Writer, writes

VOCABULARY = 61
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def made(config: Any) -> Any:
    """A model whose tokens are not all as likely."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.ndim > 1 else 1)
        model.get_output_embeddings().weight.data *= 8
    return model


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma3TextConfig])
@pytest.mark.parametrize(("given", "tokens"), [(1, 2 * PIECE + 9), (1, 1), (2, PIECE - 2), (3, PIECE)])
def test_each_step_has_the_logits_of_the_model_itself(config: Any, given: int, tokens: int) -> None:
    model = made(config(**SIZES))
    assert writes(model, given + tokens)
    starts = torch.randint(0, VOCABULARY, (5, given))
    writer, logits, heard = Writer(model, starts, tokens), list[Tensor](), list[int]()
    step = writer.step

    def noted() -> tuple[Tensor, Tensor]:
        found = step()
        logits.append(found[0])
        return found

    writer.step = noted  # type: ignore[method-assign]
    text = writer(heard.append)
    assert text is not None
    assert text.shape == (5, given + tokens)
    assert torch.equal(text[:, :given], starts)
    plain = model(input_ids=text, use_cache=False).logits[:, :-1]
    torch.testing.assert_close(torch.stack(logits, 1), plain, atol=1e-4, rtol=1e-4)
    assert heard == sorted(heard)
    assert heard[-1] == given + tokens
    assert model.config._attn_implementation == "sdpa"


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    model, many = made(LlamaConfig(**SIZES)), 20_000
    text = Writer(model, torch.full((many, 1), 7), 1)()
    assert text is not None
    with torch.no_grad():
        likely = model(input_ids=torch.tensor([[7]])).logits[0, -1].softmax(-1)
    found = torch.bincount(text[:, 1], minlength=VOCABULARY) / many
    spread = (likely * (1 - likely) / many).sqrt()
    assert likely.max() > 3 / VOCABULARY
    assert ((found - likely).abs() <= 5 * spread + 1e-9).all()


def test_a_model_that_computes_something_else_is_not_written_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(LlamaConfig(**SIZES))

    def other(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        found, weights = writing_one_token(module, query, key, value, *rest, **more)
        return found * 2, weights

    writing_one_token = writing.one_token
    monkeypatch.setattr(writing, "one_token", other)
    assert Writer(model, torch.randint(0, VOCABULARY, (4, 2)), 5)() is None
    assert model.config._attn_implementation == "sdpa"


def test_nor_is_one_that_does_so_only_behind_its_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one token alone attention is its value, wherever it stands and whatever is hidden from it."""
    model = made(LlamaConfig(**SIZES))

    def unmasked(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **more: Any) -> Any:
        seen = mask.clone()
        seen[..., 2:] &= mask.sum() <= 2
        return writing_one_token(module, query, key, value, seen, **more)

    writing_one_token = writing.one_token
    monkeypatch.setattr(writing, "one_token", unmasked)
    for tokens in (3, 2 * PIECE):
        assert Writer(model, torch.randint(0, VOCABULARY, (4, 1)), tokens)() is None


@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(**SIZES, sliding_window=PIECE),
        Gemma2Config(**SIZES, attn_implementation="eager"),
        MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY),
    ],
)
def test_other_layers_than_plain_attention_are_refused(config: Any) -> None:
    assert not writes(AutoModelForCausalLM.from_config(config), PIECE + 1)


@GPU
@pytest.mark.parametrize("heads", [2, 6])
def test_recorded_steps_write_what_the_model_finds_likely(heads: int) -> None:
    model = made(LlamaConfig(**{**SIZES, "num_key_value_heads": heads})).to("cuda", torch.bfloat16)
    starts = torch.randint(0, VOCABULARY, (512, 2), device="cuda")
    text = Writer(model, starts, 3 * PIECE)()
    assert text is not None
    with torch.no_grad():
        log_p = model(input_ids=text).logits[:, 1:-1].float().log_softmax(-1)
    drawn = -log_p.gather(-1, text[:, 2:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert entropy.mean() < 0.97 * torch.tensor(float(VOCABULARY)).log()
    # At every place, so that one that is recorded wrongly shows.
    error = (drawn - entropy).std(0) / len(text) ** 0.5
    assert ((drawn.mean(0) - entropy.mean(0)).abs() <= 6 * error).all()
