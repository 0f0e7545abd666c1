"""An export holds what its source held: the model under its names, everything else byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packed_models import (
    compare,
    export,
    open_model,
    packed_blocks,
    reader_of,
    reload,
    save_model,
    some_ids,
    trained_logits,
    write,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.models.carried import carried

EXTRA: dict[str, Tensor] = {
    "model.layers.2.mlp.up_proj.weight": torch.randn(6, 4),
    "mtp.layers.0.eh_proj.weight": torch.randn(5, 3).bfloat16(),
    "mtp.norm.weight": torch.randn(3).half(),
    "score.bias": torch.arange(7, dtype=torch.int16),
    "extra.scale": torch.rand(9).to(torch.float8_e4m3fn),
    "model.rotary_emb.inv_freq": torch.ones(8),
}


def with_extra(folder: Path, extra: dict[str, Tensor]) -> Path:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 200_000])
def test_what_the_model_does_not_use_is_in_the_export_byte_for_byte(tmp_path: Path, shard_bytes: int) -> None:
    lm, blocks, result = export(
        with_extra(save_model(tmp_path / "source"), EXTRA), tmp_path / "out", 4, 64, shard_bytes=shard_bytes
    )
    assert (len(result.files) == 1) is (shard_bytes == 1 << 30)
    stored = tensors_of(result.path)
    for name in EXTRA.keys() - {"model.rotary_emb.inv_freq"}:
        assert stored[name].dtype == EXTRA[name].dtype
        assert torch.equal(stored[name].view(torch.uint8), EXTRA[name].view(torch.uint8))
    assert "model.rotary_emb.inv_freq" not in stored
    verified = compare(result.path, lm, blocks.__getitem__, some_ids(1, 8))
    assert verified.problems == ()
    assert result.bytes == sum((result.path / name).stat().st_size for name in result.files)


@pytest.mark.parametrize("change", ["changed", "lost", "retyped"])
def test_a_carried_tensor_that_is_not_the_sources_is_caught(tmp_path: Path, change: str) -> None:
    lm, blocks, result = export(with_extra(save_model(tmp_path / "source"), EXTRA), tmp_path / "out", 4, 64)
    stored, name = tensors_of(result.path), "mtp.norm.weight"
    if change == "lost":
        del stored[name]
    else:
        stored[name] = stored[name] + 1 if change == "changed" else stored[name].view(torch.bfloat16)
    save_file(stored, result.path / "model.safetensors", metadata={"format": "pt"})
    verified = compare(result.path, lm, blocks.__getitem__, some_ids(1, 8))
    assert not verified.verified
    assert any(name in problem for problem in verified.problems)


def as_plain_checkpoint(exported: Path, folder: Path) -> Path:
    """The dequantized weights of an export under its own names, as a model that is not quantized."""
    reader = reader_of(exported)
    folder.mkdir()
    save_file(
        {name: reader.load(name).float() for name in reader.names()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((exported / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("model_type", "renamed"),
    [
        ("gpt_neox", "embed_out.weight"),
        ("llama", "lm_head.weight"),
        ("opt", "model.decoder.embed_tokens.weight"),
    ],
)
def test_an_export_opens_in_transformers_under_the_names_of_its_source(
    tmp_path: Path, model_type: str, renamed: str
) -> None:
    source = save_model(tmp_path / "source", model_type, **({"ffn_dim": 384} if model_type == "opt" else {}))
    names = set(tensors_of(source))
    assert renamed in names
    lm, blocks, result = export(source, tmp_path / "out", 4, 64)
    assert set(reader_of(result.path).names()) == names
    assert compare(result.path, lm, blocks.__getitem__, some_ids(1, 8)).problems == ()
    whole = AutoModelForCausalLM.from_pretrained(
        as_plain_checkpoint(result.path, tmp_path / "plain"), dtype=torch.float32
    )
    again = reload(result.path)
    ids = some_ids()
    want = trained_logits(again, blocks, ids)
    with torch.no_grad():
        torch.testing.assert_close(whole.eval()(ids).logits, want, rtol=0, atol=2e-2)


def test_a_head_that_was_saved_under_its_new_name_keeps_it(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "gpt_neox")
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("embed_out.weight")
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    opened, lm = open_model(source)
    assert carried(lm) == []
    write(tmp_path / "out", lm, opened, packed_blocks(lm, 4, 64).__getitem__)
    assert set(reader_of(tmp_path / "out").names()) == set(stored)
