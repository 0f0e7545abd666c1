"""What cannot be read or quantized is refused in one sentence that names the file, layer or tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, PreTrainedConfig

from engine.config.model import ModelConfig
from engine.errors import EqatError, ExitCode, PreflightError
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("pristine") / "model", "llama2", shard_size="100KB")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


def load_everything(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    lm = CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, dtype)
    for index in range(lm.blocks):
        lm.load_block(index)


def refusal(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(PreflightError) as caught:
        load_everything(folder, dtype)
    assert caught.value.exit_code == ExitCode.PREFLIGHT
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shard_with(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
    """Rewrite one tensor of a sharded checkpoint, or drop it."""
    shard = shard_with(folder, name)
    tensors = load_file(shard)
    edited = edit(tensors.pop(name))
    if edited is not None:
        tensors[name] = edited.contiguous()
    save_file(tensors, shard)
    return shard


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- files -----------------------------------------------------------------------------------------------


def test_an_untouched_sharded_copy_loads(folder: Path) -> None:
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    load_everything(folder)


def test_missing_folder() -> None:
    with pytest.raises(EqatError) as caught:
        load_everything(Path("/no/such/model"))
    assert caught.value.exit_code == ExitCode.PREFLIGHT
    assert "/no/such/model" in str(caught.value)


def test_missing_shard_is_named(folder: Path) -> None:
    shard = shard_with(folder, "model.layers.1.mlp.up_proj.weight")
    shard.unlink()
    assert shard.name in refusal(folder)


def test_truncated_shard_is_found_when_the_model_is_opened(folder: Path) -> None:
    shard = shard_with(folder, "model.layers.2.mlp.up_proj.weight")
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(PreflightError, match="truncated") as caught:
        ModelSource.open(ModelConfig(source=str(folder)))
    assert shard.name in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x05",
        b"\xff" * 64,
        (10).to_bytes(8, "little") + b"not a json" + bytes(50),
        (2).to_bytes(8, "little") + b"[]",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["empty", "one byte", "noise", "bad json", "a list", "git lfs pointer"],
)
def test_damaged_shard_is_named(folder: Path, damage: bytes) -> None:
    shard = shard_with(folder, "model.norm.weight")
    shard.write_bytes(damage)
    assert shard.name in refusal(folder)


def test_header_whose_ranges_and_shapes_disagree(folder: Path) -> None:
    shard = shard_with(folder, "model.norm.weight")
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 8]}})
    shard.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(64))
    assert "damaged header" in refusal(folder)


def test_damaged_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    assert "index" in refusal(folder)


def test_index_that_points_outside_its_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    assert "outside" in refusal(folder)


def test_pickled_weights_only(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    message = refusal(folder)
    assert "pickle" in message
    assert "save_pretrained" in message


def test_no_weights_at_all(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert "no weights" in refusal(folder)


def test_folder_without_config_names_the_gguf_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf" in refusal(tmp_path)


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json" in refusal(folder)


def test_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="no_such_type")
    assert "no_such_type" in refusal(folder)


def test_repository_code_is_not_run_unasked(folder: Path) -> None:
    edit_config(folder, model_type="own_code", auto_map={"AutoConfig": "configuration.Own"})
    (folder / "configuration.py").write_text("raise SystemExit('ran')")
    assert "--trust-remote-code" in refusal(folder)


# -- tensors ---------------------------------------------------------------------------------------------


def test_missing_tensor_is_named(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    shard = change(folder, name, lambda weight: None)
    message = refusal(folder)
    assert name in message
    assert shard.name in message


def test_tensor_missing_from_index_and_shards_is_named(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    change(folder, name, lambda weight: None)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    assert name in refusal(folder)


def test_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    change(folder, "model.layers.0.mlp.down_proj.weight", lambda weight: weight[:, :-1])
    message = refusal(folder)
    assert "[64, 127]" in message
    assert "[64, 128]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight_is_named(folder: Path, value: float) -> None:
    name = "model.layers.2.self_attn.v_proj.weight"

    def poison(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = value
        return weight

    change(folder, name, poison)
    message = refusal(folder)
    assert name in message
    assert "NaN" in message


def test_weights_too_large_for_float16_ask_for_another_type(folder: Path) -> None:
    change(folder, "model.layers.0.mlp.up_proj.weight", lambda weight: weight + 1e5)
    assert "bfloat16" in refusal(folder, torch.float16)
    load_everything(folder, torch.bfloat16)


def test_integer_weights_are_an_already_quantized_model(folder: Path) -> None:
    change(folder, "model.layers.0.mlp.up_proj.weight", lambda weight: weight.to(torch.int8))
    assert "already quantized" in refusal(folder)


# -- architectures ---------------------------------------------------------------------------------------


def test_already_quantized_configuration(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(folder)
    assert "already quantized (gptq)" in message
    assert "16-bit" in message


def save_random(folder: Path, config: PreTrainedConfig) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_fused_expert_weights_name_the_tensor(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    message = refusal(save_random(tmp_path, config))
    assert "model.layers.0.mlp.experts" in message
    assert "dense" in message


def test_encoder_decoder(tmp_path: Path) -> None:
    BartConfig(d_model=16, vocab_size=32).save_pretrained(tmp_path)
    assert "encoder-decoder" in refusal(tmp_path)


def test_projections_that_are_not_linear_name_the_class(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    assert "Conv1D" in refusal(save_random(tmp_path, config))


def test_model_type_without_a_causal_language_model(tmp_path: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "'vit'" in refusal(tmp_path)
