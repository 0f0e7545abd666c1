"""Configurations as people have them: read as transformers reads them, or refused with the field's name.

What is wrong with somebody's config.json, or their chat template, is never called a bug of ours.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine_runs import SMALL, failure, make_run, of, output, run_here
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.config.model import ModelConfig
from engine.errors import ExitCode, PreflightError
from engine.models.causal_lm import CausalLM
from engine.models.foreign import reason, to_blame
from engine.models.source import ModelSource
from engine.run.directory import RunDirectory
from engine.run.events import Error

NEWER = ("rope_parameters", "dtype")
"""Fields that files of older releases do not have."""


def written(folder: Path, changes: dict[str, Any], without: tuple[str, ...] = NEWER) -> Path:
    path = folder / "config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps({**kept, **changes}))
    return folder


def opened(folder: Path) -> CausalLM:
    source = ModelSource.open(ModelConfig(source=str(folder)))
    return CausalLM(source, torch.device("cpu"), torch.float32)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    lm = opened(folder)
    hidden = lm.embed(tiny.tokens())
    for index in range(lm.blocks):
        hidden = lm.run_block(lm.load_block(index), index, hidden)
    return lm.head(hidden)


READ: list[dict[str, Any]] = [
    {"dtype": "torch.float32"},
    {"dtype": "auto"},
    {"torch_dtype": "torch.bfloat16"},
    {"torch_dtype": "auto"},
    {"rope_theta": 500000.0},
    {"rope_theta": 10000, "rope_scaling": None},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
    {"architectures": None, "num_hidden_layers": 2},
    {"architectures": ["LlamaForCausalLMWithCache"], "pretraining_tp": 2},
    {"num_local_experts": 8, "num_experts_per_tok": 2},
    {"num_experts": 1, "num_local_experts": None},
    {"pad_token_id": -1, "eos_token_id": [2, 1]},
    {"head_dim": None, "sliding_window": None, "quantization_config": None},
]


@pytest.mark.parametrize("changes", READ, ids=lambda value: str(value)[:60])
def test_it_is_read_as_transformers_reads_it(changes: dict[str, Any], folder: Path) -> None:
    written(folder, changes)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tiny.tokens()).logits
    assert torch.allclose(logits(folder), expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "flash_attention_2", "output_attentions": True},
        {"attn_implementation": "sdpa", "output_attentions": True, "return_dict": False},
    ],
    ids=str,
)
def test_how_a_model_is_to_be_run_is_not_for_its_file_to_say(changes: dict[str, Any], folder: Path) -> None:
    """transformers refuses these, or reads another number of answers than we do."""
    expected = logits(folder)
    assert torch.equal(logits(written(folder, changes, without=())), expected)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "no_such"}, "hidden_act"),
    ({"hidden_act": 3}, "hidden_act"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"initializer_range": "0.02"}, "initializer_range"),
    ({"rope_theta": "10000"}, "rope_theta"),
    ({"rope_theta": "much"}, "rope_theta"),
    ({"rope_theta": None}, "rope_theta"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
    ({"rope_scaling": {"type": "su", "factor": 2.0}}, "type"),
    ({"rope_parameters": {"rope_type": "no_such"}}, "rope_type"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["no_such"] * 3}, "layer_types"),
    ({"dtype": "float33"}, "dtype"),
    ({"attention_bias": "false"}, "attention_bias"),
    ({"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight"),
    ({"vocab_size": 319}, "model.embed_tokens.weight"),
    ({"num_key_value_heads": None}, "model.layers.0.self_attn.k_proj.weight"),
]


@pytest.mark.parametrize(("changes", "name"), REFUSED, ids=lambda value: str(value)[:60])
def test_it_is_refused_with_the_name_of_what_is_wrong(
    changes: dict[str, Any], name: str, folder: Path
) -> None:
    with pytest.raises(PreflightError) as caught:
        logits(written(folder, changes))
    said = str(caught.value)
    assert name in said
    assert "\n" not in said


def test_a_head_that_is_neither_stored_nor_tied_is_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PreflightError, match=r"lm_head\.weight"):
        opened(written(folder, {}, without=("tie_word_embeddings",)))


def test_a_message_that_ends_with_a_colon_is_told_with_its_next_line() -> None:
    assert (
        reason(ValueError("field 'x':\n  TypeError: no number\n more")) == "field 'x': TypeError: no number"
    )
    assert reason(ValueError("one\ntwo")) == "one"
    assert to_blame(KeyError("gelu9"), {"a": {"act": "gelu9"}}) == "a.act"
    assert to_blame(RuntimeError("something else"), {"hidden_act": "else"}) == ""


# -- whole runs --------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], RunDirectory]]:
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))
    options = {
        **SMALL,
        "grid.bits": 4,
        "grid.group_size": 32,
        "block_ap.enabled": False,
        "e2e_qp.enabled": False,
    }
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    threads = torch.get_num_threads()
    yield lambda source: make_run(tmp_path / "runs", {**options, "model.source": str(source)})
    # An engine that runs inside this process sets both for good.
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "no_such"},
        {"rope_theta": "10000"},
        {"num_hidden_layers": 2.0},
    ],
    ids=str,
)
def test_a_run_ends_with_one_line_about_the_model(
    changes: dict[str, Any], folder: Path, runs: Callable[[Path], RunDirectory]
) -> None:
    run = runs(written(folder, changes))
    assert run_here(run) == ExitCode.PREFLIGHT
    error = failure(run, ExitCode.PREFLIGHT)
    assert next(iter(changes)) in f"{error.message} {error.hint}"


def test_a_chat_template_that_raises_is_the_models_fault(
    folder: Path, runs: Callable[[Path], RunDirectory]
) -> None:
    """A run has no need of it; who asks for a sample is told."""
    written(folder, {"_attn_implementation": "flash_attention_2", "return_dict": False})
    (folder / "chat_template.jinja").write_text("{{ raise_exception('system only') }}")
    run = runs(folder)
    assert run_here(run) == ExitCode.DONE, output(run)
    assert run_here(run, "--task", "generate", "--prompt", "Hello") == ExitCode.PREFLIGHT
    assert "Traceback" not in output(run)
    (error,) = of(run, Error)
    assert "chat template" in error.where
    assert "system only" in error.message
