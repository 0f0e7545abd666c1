"""What is not quantized is stored in the original's type, declared so, and fits and works when read so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import compare, open_model, packed_blocks, reader_of, save_model, some_ids, write
from safetensors.torch import load_file, save_file

from engine.errors import ExitCode, PreflightError
from engine.export.declared import AsDeclared
from engine.export.stored import as_stored, check_activations, check_values, export_dtype, outer_as_stored
from engine.models.causal_lm import CausalLM

LARGE_NORM = 4e4
"""What float16 holds, and what no activation may be multiplied by in it."""


def saved_as(directory: Path, dtype: torch.dtype, declares: str | None = "same", **changed: float) -> Path:
    """The checkpoint again in another type, some tensors filled with a value; ``declares`` in its config."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(directory / "model.safetensors").items()}
    for name, value in changed.items():
        tensors[name].fill_(value)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    if declares is not None:
        config["dtype"] = str(dtype).removeprefix("torch.") if declares == "same" else declares
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def gemma(folder: Path, **changes: Any) -> Path:
    layers = ["sliding_attention", "full_attention"]
    return save_model(folder, "gemma3_text", head_dim=64, layer_types=layers, sliding_window=8, **changes)


def export(directory: Path, out: Path, dtype: str = "auto") -> tuple[CausalLM, list[Any], Path]:
    source, lm = open_model(directory)
    blocks = packed_blocks(lm, 4, 64)
    return lm, blocks, write(out, lm, source, blocks.__getitem__, dtype=dtype).path


@pytest.mark.parametrize(
    ("stored", "declares", "wanted"),
    [
        (torch.float16, "same", torch.float16),
        (torch.bfloat16, "same", torch.bfloat16),
        (torch.float32, "same", torch.bfloat16),
        (torch.float32, "float16", torch.float16),
        (torch.float16, None, torch.float16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.bfloat16),
    ],
)
def test_the_type_is_what_the_original_declares_or_else_is_stored_in(
    tmp_path: Path, stored: torch.dtype, declares: str | None, wanted: torch.dtype
) -> None:
    _, lm = open_model(saved_as(save_model(tmp_path / "fp"), stored, declares))
    assert export_dtype("auto", lm) == wanted
    assert export_dtype("float32", lm) == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_everything_that_is_not_quantized_is_stored_and_declared_in_the_type_asked_for(
    tmp_path: Path, dtype: str
) -> None:
    directory = save_model(tmp_path / "fp", "qwen2", tie_word_embeddings=False)
    lm, blocks, path = export(directory, tmp_path / "out", dtype)
    tensors, asked = load_file(path / "model.safetensors"), getattr(torch, dtype)
    plain = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    scales = {name for name in plain if name.endswith(".scales")}
    assert {tensor.dtype for name, tensor in plain.items() if name not in scales} == {asked}
    assert {plain[name].dtype for name in scales} == {torch.float16}, "what loaders expect, and exact"
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert dtype in (path / "README.md").read_text()
    check = compare(path, lm, blocks.__getitem__, some_ids(), dtype=dtype)
    assert check.problems == ()
    assert check.note == ""
    original = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(plain["model.embed_tokens.weight"], original.to(asked))


def test_an_original_of_16_bits_is_stored_without_any_rounding(tmp_path: Path) -> None:
    directory = saved_as(save_model(tmp_path / "fp"), torch.bfloat16)
    _, _, path = export(directory, tmp_path / "out")
    original = load_file(directory / "model.safetensors")
    reader = reader_of(path)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(reader.stored(name), original[name])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_norm_that_float16_cannot_compute_with_is_finite_when_read_as_declared(
    tmp_path: Path, stored: torch.dtype
) -> None:
    large = {"model.layers.0.pre_feedforward_layernorm.weight": LARGE_NORM}
    directory = saved_as(gemma(tmp_path / "fp"), stored, **large)
    lm, blocks, path = export(directory, tmp_path / "out")
    check = compare(path, lm, blocks.__getitem__, some_ids())
    assert check.problems == ()
    assert check.perplexity_packed is not None
    assert math.isfinite(check.perplexity_packed)


def test_an_export_that_overflows_when_read_as_declared_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Every bit is right, and the logits are in other arithmetic: nobody could use it."""
    large = {"model.layers.0.pre_feedforward_layernorm.weight": LARGE_NORM}
    directory = saved_as(gemma(tmp_path / "fp"), torch.bfloat16, **large)
    lm, blocks, path = export(directory, tmp_path / "out", "float16")
    check = compare(path, lm, blocks.__getitem__, some_ids(), dtype="float16")
    assert (check.verified, check.overflow) == (False, "float16")
    with pytest.raises(Exception, match="cannot be used as it declares itself") as caught:
        check.raise_if_failed("gptq_v2.failed")
    error: Any = caught.value
    assert error.exit_code == ExitCode.NON_FINITE
    assert "--set export.dtype=bfloat16" in error.hint
    assert "gptq_v2.failed" in error.hint


def test_an_original_that_overflows_in_its_own_type_is_found_before_training(tmp_path: Path) -> None:
    large = {"model.layers.1.pre_feedforward_layernorm.weight": LARGE_NORM}
    _, lm = open_model(saved_as(gemma(tmp_path / "fp"), torch.float16, **large))
    with pytest.raises(PreflightError, match="activations exceed 65504") as caught:
        check_activations(lm, torch.float16, some_ids())
    assert caught.value.hint == "--set export.dtype=bfloat16"
    check_activations(lm, torch.bfloat16, some_ids())


def test_one_that_does_not_overflow_passes(tmp_path: Path) -> None:
    _, lm = open_model(saved_as(gemma(tmp_path / "fp"), torch.float16))
    check_activations(lm, torch.float16, some_ids())


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.self_attn.k_proj.bias",
    ],
)
def test_a_value_that_the_type_cannot_hold_is_named_before_training(tmp_path: Path, name: str) -> None:
    directory = save_model(tmp_path / "fp", "qwen2", tie_word_embeddings=False)
    saved_as(directory, torch.float32, "float16", **{name: 7e4})
    _, lm = open_model(directory)
    with pytest.raises(
        PreflightError, match=r"holds 7e\+04, and the export's float16 ends at 6.55e\+04"
    ) as caught:
        check_values(lm, torch.float16)
    assert caught.value.where == name
    assert caught.value.hint == "--set export.dtype=bfloat16"
    check_values(lm, torch.bfloat16)


def test_a_quantized_weight_may_be_larger_than_the_type(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "fp")
    saved_as(directory, torch.float32, "float16", **{"model.layers.1.mlp.up_proj.weight": 7e4})
    _, lm = open_model(directory)
    check_values(lm, torch.float16)


def test_a_declaration_of_another_type_than_that_of_the_tensors_is_caught(tmp_path: Path) -> None:
    lm, blocks, path = export(save_model(tmp_path / "fp"), tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float16", "torch_dtype": "float16"}))
    check = compare(path, lm, blocks.__getitem__, some_ids())
    assert check.problems == ("config.json declares float16, and the tensors are bfloat16",)


def test_a_block_from_before_types_were_kept_is_exported_as_it_always_was(tmp_path: Path) -> None:
    """Older checkpoints hold norms and biases as float16, whatever the original was."""
    directory = saved_as(save_model(tmp_path / "fp", "qwen2"), torch.bfloat16)
    source, lm = open_model(directory)
    older = [as_stored(block, torch.float16, "") for block in packed_blocks(lm, 4, 64)]
    path = write(tmp_path / "out", lm, source, older.__getitem__).path
    assert compare(path, lm, older.__getitem__, some_ids()).problems == ()


def test_the_model_is_as_before_after_it_was_measured_as_stored(tmp_path: Path) -> None:
    _, lm = open_model(save_model(tmp_path / "fp", tie_word_embeddings=False))
    before = {name: tensor.clone() for name, tensor in lm.outer_state().items()}
    with outer_as_stored(lm, torch.bfloat16):
        inside = lm.outer_state()
        assert all(torch.equal(inside[name], before[name].bfloat16().float()) for name in before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.outer_state().items())


def test_only_a_difference_beyond_noise_is_said() -> None:
    draw = torch.Generator().manual_seed(0)
    trained = 3 + torch.rand(2, 200, generator=draw, dtype=torch.float64)
    noise = 0.05 * torch.randn(2, 200, generator=draw, dtype=torch.float64)

    def note(packed: torch.Tensor) -> str:
        return AsDeclared(torch.float16, trained, packed).note

    assert note(trained + noise) == ""
    assert note(trained + 0.005) == ""
    said = note(trained + 0.1 + noise)
    assert said.startswith("read as float16, as it declares itself, the export has a perplexity of 3")
    assert "the trained model 3" in said
    # One token that differs wildly says nothing about the others.
    assert note(trained + 20 * (torch.arange(400).view(2, 200) == 7)) == ""
