"""A config.json as others write it is read as transformers reads it, or refused by name: nothing else.

The refusal of the plan and that of the engine may come at different places; neither is a traceback.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.architecture.description import describe
from engine.architecture.limits import check_config
from engine.architecture.refusals import refuse
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.errors import EqatError, ExitCode, PreflightError
from engine.models.causal_lm import CausalLM
from engine.models.foreign import memory_headroom
from engine.models.source import ModelSource

CPU = torch.device("cpu")


def logits(folder: Path) -> torch.Tensor:
    """Everything that a run does before it trains."""
    described = describe(str(folder))
    refuse(described.architecture, described.config, GridConfig(bits=4, group_size=32), ["gptq_v2"])
    lm = CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)
    with torch.no_grad():
        hidden = lm.embed(tiny.tokens())
        for index in range(lm.blocks):
            hidden = lm.run_block(lm.load_block(index), index, hidden)
        return lm.head(hidden)


def written(folder: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in without}))
    return folder


def outcome(folder: Path) -> torch.Tensor | str:
    """Logits, or the one line of a refusal."""
    began = time.monotonic()
    try:
        with memory_headroom(4 << 30):
            return logits(folder)
    except EqatError as error:
        refused = error
    finally:
        assert time.monotonic() - began < 60
    assert refused.exit_code == ExitCode.PREFLIGHT, refused
    assert "\n" not in str(refused)
    assert len(str(refused)) < 2000
    return str(refused)


READ = [
    {"architectures": None},
    {"dtype": "float32"},
    {"quantization_config": {}},
    {"quantization_config": None},
    {"head_dim": None},
    {"sliding_window": None},
    {"rope_scaling": None},
    {"pad_token_id": -1},
    {"pad_token_id": 320},
    {"pad_token_id": 10**6},
    {"eos_token_id": 320, "bos_token_id": 321},
    {"eos_token_id": [2, 1]},
    {"_attn_implementation": "flash_attention_2"},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation": {"": "no-such/kernel"}},
    {"_attn_implementation_internal": "flash_attention_3"},
    {"experts_implementation": "no-such"},
    {"return_dict": False},
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"torchscript": True},
    {"pretraining_tp": 2},
    {"num_local_experts": 1, "num_experts_per_tok": None},
    {"architectures": ["MyOwnLlamaForCausalLM"]},
    {"something": float("nan"), "other": float("inf")},
]


@pytest.mark.parametrize("changes", READ, ids=str)
def test_settings_that_change_nothing_change_nothing(changes: dict[str, Any], folder: Path) -> None:
    expected = logits(folder)
    found = outcome(written(folder, changes))
    assert isinstance(found, torch.Tensor), found
    assert torch.equal(found, expected)


EITHER: list[dict[str, Any]] = [
    {"dtype": "torch.float32"},
    {"dtype": "auto"},
    {"dtype": 3},
    {"num_key_value_heads": None},
    {"rope_scaling": {"type": "su"}},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {"type": "linear", "factor": "2"}},
    {"rope_scaling": "linear"},
    {"rope_parameters": []},
    {"rope_parameters": {"rope_type": "yarn"}},
    {"rope_theta": "10000"},
    {"rms_norm_eps": "1e-5"},
    {"vocab_size": 321},
    {"vocab_size": 319},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 2},
    {"num_hidden_layers": 2.0},
    {"hidden_act": "no such"},
    {"hidden_act": 3},
    {"layer_types": ["full_attention"]},
    {"layer_types": ["full_attention"] * 100_000},
    {"output_attentions": True, "_attn_implementation": "sdpa"},
    {"output_attentions": True, "attn_implementation": "sdpa"},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": "no"},
    {"text_config": {}},
    {"text_config": {"model_type": "llama"}},
    {"per_layer_config": {"0": {"hidden_size": 3}}},
    {"max_position_embeddings": 1},
    {"attention_bias": True},
    {"bos_token_id": [1]},
    {"use_cache": 5},
]


@pytest.mark.parametrize("changes", EITHER, ids=lambda value: str(value)[:60])
def test_settings_that_may_not_fit_are_read_or_refused(changes: dict[str, Any], folder: Path) -> None:
    outcome(written(folder, changes))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"architectures": {"a": 1}}, "architectures"),
    ({"architectures": [None]}, "architectures"),
    ({"architectures": ["a\nb"]}, "architectures"),
    ({"model_type": "x" * 5000}, "model_type"),
    ({"model_type": "\ud83d"}, "model_type"),
    ({"model_type": 5}, "model_type"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"model_type": None}, ""),
    ({"model_type": "no_such"}, "no_such"),
    ({"auto_map": []}, "auto_map"),
    ({"text_config": "x"}, "text_config"),
    ({"quantization_config": "gptq"}, "already quantized"),
    ({"num_labels": 10**9}, "num_labels"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_hidden_layers": [3, 10**9]}, "num_hidden_layers"),
    ({"hidden_size": 10**12}, "hidden_size"),
    ({"vocab_size": 10**10}, "vocab_size"),
    ({"intermediate_size": 10**10}, "intermediate_size"),
    ({"num_attention_heads": 10**9}, "num_attention_heads"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_attention_heads": True}, "num_attention_heads"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": {"a": 64}}, "hidden_size"),
    ({"hidden_size": [[64]]}, "hidden_size"),
    ({"hidden_size": [64, "a"]}, "hidden_size"),
    ({"hidden_size": float("nan")}, "hidden_size"),
    ({"hidden_size": 10**400}, "hidden_size"),
    ({"head_dim": float("inf")}, "head_dim"),
    ({"max_position_embeddings": "256"}, "max_position_embeddings"),
    ({"max_position_embeddings": float("inf")}, "max_position_embeddings"),
    ({"max_position_embeddings": [None]}, "max_position_embeddings"),
    ({"sliding_window": "8"}, "sliding_window"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"num_local_experts": 10**12}, "num_local_experts"),
]


@pytest.mark.parametrize(("changes", "name"), REFUSED, ids=lambda value: str(value)[:60])
def test_sizes_and_types_that_no_model_has_are_refused_by_name(
    changes: dict[str, Any], name: str, folder: Path
) -> None:
    said = outcome(written(folder, changes))
    assert isinstance(said, str)
    assert name in said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"a": 1,}',
        b"\xef\xbb\xbf{}",
        b'{"a": "\xe9"}',
        b'{"model_type": "llama", "model_type": "llama"}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b'{"a": ' * 500 + b"1" + b"}" * 501,
        b"\x00" * 100,
        b'{"model_type": "\\ud83d"}',
    ],
    ids=range(13),
)
def test_a_file_that_is_no_configuration_is_refused(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    said = outcome(folder)
    assert isinstance(said, str)
    assert "config" in said


def test_labels_by_the_million_are_refused_before_they_are_made() -> None:
    with pytest.raises(PreflightError, match="id2label"):
        check_config({"id2label": dict.fromkeys(map(str, range(1_000_001)))}, "config.json")
    check_config({"id2label": {"0": "a"}, "num_labels": 1_000_000}, "config.json")


def test_masks_that_would_take_gigabytes_are_refused(tmp_path: Path) -> None:
    """Some families make a table of all pairs of positions before they have a single weight."""
    config = {
        "model_type": "gpt_neo",
        "architectures": ["GPTNeoForCausalLM"],
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "num_attention_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 10_000_000,
        "vocab_size": 320,
    }
    folder = tiny.build(tmp_path / "model", "llama2")
    (folder / "config.json").write_text(json.dumps(config))
    said = outcome(folder)
    assert isinstance(said, str)
    assert "memory" in said


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(folder: Path) -> None:
    tiny.byte_tokenizer(400).save_pretrained(folder)
    source = ModelSource.open(ModelConfig(source=str(folder)))
    with pytest.raises(PreflightError, match="token 399, but the model's embedding only 320 rows"):
        source.tokenizer()


def test_tokens_that_were_added_behind_the_embedding_are_no_matter_until_they_are_used(folder: Path) -> None:
    tokenizer = tiny.byte_tokenizer(320)
    tokenizer.add_tokens(["<image>"])
    tokenizer.add_special_tokens({"pad_token": "<|padding|>", "eos_token": "<|late|>"})
    tokenizer.save_pretrained(folder)
    source = ModelSource.open(ModelConfig(source=str(folder)))
    assert len(source.tokenizer()) == 323
    assert source.tokenizer()("a")["input_ids"]


# -- attention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama2", "gemma2", "gemma3"])
def test_a_configuration_never_chooses_the_attention(name: str, tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "model", name)
    for key in ("_attn_implementation", "attn_implementation"):
        written(folder, {key: "flash_attention_2", "_experts_implementation": "no-such"})
        lm = CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)
        chosen = lm.model.config._attn_implementation
        assert chosen == ("eager" if name == "gemma2" else "sdpa")


def test_a_family_without_fused_attention_gets_the_plain_one() -> None:
    from transformers import AutoConfig

    from engine.models.skeleton import build_skeleton

    options = {"n_layer": 1, "hidden_size": 64, "n_head": 4, "vocab_size": 320}
    config = AutoConfig.for_model("bloom", **options, attn_implementation="flash_attention_2")
    assert build_skeleton(config, torch.float32).config._attn_implementation == "eager"


# -- anything ------------------------------------------------------------------------------------------

SOME = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted({*tiny.SIZES, "model_type", "rope_parameters", "hidden_act", "layer_types", "rms_norm_eps",
                 "tie_word_embeddings", "sliding_window", "head_dim", "text_config", "dtype", "id2label",
                 "quantization_config", "architectures", "attention_bias", "initializer_range"})  # fmt: skip


@given(changes=st.dictionaries(st.sampled_from(FIELDS), SOME, min_size=1, max_size=2))
@settings(max_examples=40, deadline=None)
def test_any_value_anywhere_is_read_or_refused(pristine: Path, changes: dict[str, Any]) -> None:
    before = (pristine / "config.json").read_text()
    try:
        outcome(written(pristine, changes))
    finally:
        (pristine / "config.json").write_text(before)
