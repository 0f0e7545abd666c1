"""The plan says of a tokenizer what the run would say, and nothing of tokens that nobody uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.architecture.special_tokens import unused_tokens
from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.errors import ExitCode, PreflightError
from engine.plan.plan import Plan, make_plan

ROWS = 320
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WRITES_FIRST = {
    "type": "Sequence",
    "processors": [
        {"type": "ByteLevel"},
        {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
    ],
}


def folder(path: Path, *, begin: int = 1, end: int = 2, writes: bool = False, **config: Any) -> Path:
    """A model's folder without weights whose tokenizer has its special tokens at these places."""
    path.mkdir(exist_ok=True)
    added = [
        {"id": begin, "content": "<s>"},
        {"id": end, "content": "</s>"},
        {"id": 999, "content": "<image>"},
    ]
    processor = WRITES_FIRST if writes else None
    tokenizer = {"added_tokens": added, "post_processor": processor, "model": {"vocab": {"a": 0}}}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": "<image>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return path


def planned(path: Path, **overrides: Any) -> Plan:
    config = apply_overrides(load("smoke"), {"model.source": str(path), **overrides})
    return make_plan(config, device="cpu")


def test_tokens_that_nobody_uses_are_no_matter(tmp_path: Path) -> None:
    planned(folder(tmp_path / "a"))
    planned(folder(tmp_path / "a", begin=ROWS))
    off = {"block_ap.enabled": False, "e2e_qp.enabled": False}
    planned(folder(tmp_path / "a", end=ROWS), **off)
    planned(folder(tmp_path / "a", begin=ROWS, writes=True), **{"model.bos": "never"})


def test_a_token_between_documents_needs_a_row(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=rf"documents are separated by </s>.* token {ROWS}") as refused:
        planned(folder(tmp_path / "a", end=ROWS))
    assert refused.value.exit_code == ExitCode.PREFLIGHT
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("writes", "bos"), [(True, "auto"), (True, "always"), (False, "always")])
def test_a_token_that_sequences_begin_with_needs_a_row(writes: bool, bos: str, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="sequences begin with <s>"):
        planned(folder(tmp_path / "a", begin=ROWS, writes=writes), **{"model.bos": bos})


@pytest.mark.parametrize("content", ["", "[]", "{", '{"added_tokens": 3}', '{"added_tokens": [{"id": "x"}]}'])
def test_a_tokenizer_that_cannot_be_read_is_left_to_the_engine(content: str, tmp_path: Path) -> None:
    (folder(tmp_path / "a", end=ROWS) / "tokenizer.json").write_text(content)
    planned(tmp_path / "a")
    (folder(tmp_path / "a", end=ROWS) / "tokenizer_config.json").unlink()
    planned(tmp_path / "a")


def test_what_the_configuration_names_beside_the_embedding_is_said(tmp_path: Path) -> None:
    named = {"eos_token_id": [2, ROWS], "bos_token_id": ROWS + 1, "pad_token_id": -1}
    (folder(tmp_path / "a", **named) / "generation_config.json").write_text('{"eos_token_id": [1, 400]}')
    found = planned(tmp_path / "a").warnings
    assert [line for line in found if line.startswith("generation_config.json names eos_token_id 400,")]
    assert [line for line in found if f"eos_token_id {ROWS}, and the embedding has only {ROWS} rows" in line]
    assert [line for line in found if f"bos_token_id {ROWS + 1}" in line]
    (tmp_path / "a" / "generation_config.json").write_text("[half a li")
    assert len(planned(tmp_path / "a").warnings) == len(found) - 1
    assert not list(unused_tokens({"config.json": CONFIG, "b": {"eos_token_id": True}}, ROWS))
    assert not list(unused_tokens({"config.json": {"eos_token_id": "x", "bos_token_id": None}}, ROWS))
