"""Samples of text are what greedy decoding writes, and leave no trace in the model."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import plain_greedy
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.data.encoding import Encoder
from engine.errors import IdentityError, PreflightError
from engine.evaluation import chat
from engine.evaluation.continuation import continuation, end_tokens, prompt_ids
from engine.evaluation.perplexity import perplexity
from engine.methods.blockwise.rtn import round_to_nearest
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.models.tokenizer import byte_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPT = "Once upon a time"
TEMPLATE = (
    "{% for turn in messages %}<|begin|>{{ turn.role }}: {{ turn.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def opened(source: str | Path) -> CausalLM:
    return CausalLM(ModelSource.open(ModelConfig(source=str(source))), torch.device("cpu"), torch.float32)


@pytest.fixture
def tiny() -> CausalLM:
    return opened("random://tiny-llama")


def saved(directory: Path, model_type: str, **changes: Any) -> CausalLM:
    """A small model of another family, far from the uniform prediction."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.ndim == 2 else 1
    model.save_pretrained(directory)
    byte_tokenizer(300).save_pretrained(directory)
    return opened(str(directory))


def rounded(lm: CausalLM) -> Callable[[int], nn.Module]:
    """The model on a coarse grid, computing with packed integers."""

    def block_for(index: int) -> nn.Module:
        block = lm.load_block(index)
        return round_to_nearest(block, lm.linear_names(index), GridConfig(bits=3, group_size=32)).install(
            block
        )

    return block_for


def check_against_plain(lm: CausalLM, block_for: Callable[[int], nn.Module], new: int = 24) -> str:
    tokenizer = lm.source.tokenizer()
    ids_1T = prompt_ids(Encoder(tokenizer), PROMPT)
    want = plain_greedy(lm, block_for, ids_1T[0].tolist(), new)
    made = continuation(lm, block_for, ids_1T, new)
    assert made.text == tokenizer.decode(want, skip_special_tokens=True)
    assert made.tokens == len(want)
    assert made.seconds > 0
    return made.text


# -- the text ------------------------------------------------------------------------------------------


def test_the_text_is_that_of_a_plain_greedy_loop_before_and_after_quantization(tiny: CausalLM) -> None:
    texts = {check_against_plain(tiny, tiny.load_block), check_against_plain(tiny, rounded(tiny))}
    assert len(texts) == 2, "a grid of 3 bits changes what random weights say"


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("gemma2", {"head_dim": 16, "sliding_window": 8}),  # shorter than the prompt
    ],
)
def test_other_families_write_what_a_plain_greedy_loop_writes(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    lm = saved(tmp_path, model_type, **changes)
    check_against_plain(lm, lm.load_block)
    check_against_plain(lm, rounded(lm))


def test_text_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    """Chat models name the end of a turn in generation_config.json only."""
    lm = saved(tmp_path, "llama")
    ids_1T = prompt_ids(Encoder(lm.source.tokenizer()), PROMPT)
    free = plain_greedy(lm, lm.load_block, ids_1T[0].tolist(), 8)
    end = free[3]
    assert end_tokens(lm) == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    lm = opened(tmp_path)
    assert end_tokens(lm) == sorted({2, end})
    made = continuation(lm, lm.load_block, ids_1T, 8)
    assert made.tokens == free.index(end) + 1
    (tmp_path / "generation_config.json").write_text("[half a li")
    assert end_tokens(opened(tmp_path)) == [2]
    with pytest.raises(IdentityError, match=r"generation_config\.json"):
        end_tokens(lm)


def test_a_broken_list_of_end_tokens_is_ignored(tmp_path: Path) -> None:
    lm = saved(tmp_path, "llama")
    broken = ('{"a": 1}', '[1e400, -1, "x", null, true]', "999999", "[[2]]")
    for content in ("null", "{}", *(f'{{"eos_token_id": {value}}}' for value in broken)):
        (tmp_path / "generation_config.json").write_text(content)
        lm = opened(tmp_path)
    assert end_tokens(lm) == [2]


def test_only_a_tokenizer_that_knows_conversations_gets_a_turn() -> None:
    tokenizer = byte_tokenizer(300)
    plain = prompt_ids(Encoder(tokenizer), "Hi")
    assert tokenizer.decode(plain[0]) == "Hi"
    tokenizer.chat_template = TEMPLATE
    turn = prompt_ids(Encoder(tokenizer), "Hi")
    assert tokenizer.decode(turn[0]) == "<|begin|>user: Hi>"
    assert turn[0].tolist().count(tokenizer.bos_token_id) == 1, "the template writes it, nobody else"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "still at work"),
        ("{{ 9**(9**9) }}", "memory|still at work|ended the process"),
        ("{{ 'x' * 30000000 }}", "too much"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{% for %}", "Expected an expression"),
        ("{{ raise_exception('no such\nrole') }}", "no such"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("(" * 100_000, ""),
        ("{{ " + "(" * 100_000, ""),
    ],
)
def test_a_template_that_fails_or_never_ends_is_one_line_in_time(
    template: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "still at work" in says:  # the others have all the time that there is, on a busy machine
        monkeypatch.setattr(chat, "SECONDS", 3.0)
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = template
    began = time.monotonic()
    if not says:
        with contextlib.suppress(PreflightError):
            assert prompt_ids(Encoder(tokenizer), "Hi").shape[0] == 1
        return
    with pytest.raises(PreflightError, match=says) as caught:
        prompt_ids(Encoder(tokenizer), "Hi")
    assert "chat template" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30


def test_what_a_template_writes_arrives_whatever_it_is() -> None:
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = "{{ messages[0].content * 1000 }}🙂\u0000"
    ids = prompt_ids(Encoder(tokenizer), "naïve 日本")[0]
    assert tokenizer.decode(ids) == "naïve 日本" * 1000 + "🙂\u0000"


def test_a_stop_is_heard_after_the_next_token(tiny: CausalLM) -> None:
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    ids_1T = prompt_ids(Encoder(tiny.source.tokenizer()), PROMPT)
    assert continuation(tiny, tiny.load_block, ids_1T, 1000, should_stop=should_stop).tokens == 3


# -- the model afterwards ------------------------------------------------------------------------------


def test_the_blocks_are_taken_out_again_and_the_model_measures_as_before(tiny: CausalLM) -> None:
    windows = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(3))
    before = perplexity(tiny, tiny.load_block, windows).nll_mean
    structure = list(tiny._blocks)
    loaded: list[weakref.ref[nn.Module]] = []

    def block_for(index: int) -> nn.Module:
        block = tiny.load_block(index)
        loaded.append(weakref.ref(block))
        return block

    ids_1T = prompt_ids(Encoder(tiny.source.tokenizer()), PROMPT)
    continuation(tiny, block_for, ids_1T, 4)
    gc.collect()
    assert len(loaded) == tiny.blocks
    assert [reference() for reference in loaded] == [None] * tiny.blocks, "a block stayed in memory"
    assert list(tiny._blocks) == structure
    assert all(parameter.is_meta for parameter in tiny._blocks.parameters())
    assert perplexity(tiny, tiny.load_block, windows).nll_mean == before


def test_a_block_that_cannot_be_loaded_leaves_the_model_as_it_was(tiny: CausalLM) -> None:
    structure = list(tiny._blocks)

    def block_for(index: int) -> nn.Module:
        if index == 2:
            raise MemoryError
        return tiny.load_block(index)

    with pytest.raises(MemoryError), tiny.whole(block_for):
        raise AssertionError("there is no whole model")
    assert list(tiny._blocks) == structure
    assert continuation(tiny, tiny.load_block, torch.tensor([[5, 6]]), 2).tokens == 2


def test_the_blocks_are_as_large_as_they_are_said_to_be(tiny: CausalLM) -> None:
    blocks = [tiny.load_block(index) for index in range(tiny.blocks)]
    sizes = [p.numel() * p.element_size() for block in blocks for p in block.parameters()]
    assert tiny.blocks_bytes() == sum(sizes)
