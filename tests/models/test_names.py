"""A checkpoint is read as transformers reads it: the same tensors, names and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import more_families
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

import engine.models.names as names_module
from engine.architecture.description import describe
from engine.architecture.headers import ITEM_BITS
from engine.config.model import ModelConfig
from engine.errors import PreflightError
from engine.models.carried import carried, in_words, skipped
from engine.models.causal_lm import CausalLM
from engine.models.names import TensorNames
from engine.models.source import ModelSource

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


def opened(folder: Path) -> CausalLM:
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)


@torch.no_grad()
def ours(lm: CausalLM) -> Tensor:
    hidden = lm.embed(tiny.tokens())
    for index in range(lm.blocks):
        hidden = lm.run_block(lm.load_block(index), index, hidden)
    return lm.head(hidden)


@torch.no_grad()
def theirs(folder: Path) -> Tensor:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return tiny.with_soft_cap(whole.eval())(tiny.tokens()).logits


def change(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def add(**tensors: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda stored: {**stored, **tensors}


def build(folder: Path, name: str, **saving: object) -> Path:
    if name in tiny.ARCHITECTURES:
        return tiny.build(folder, name)
    return more_families.build(folder, name, **saving)


EVERY = [*tiny.ARCHITECTURES, *more_families.FAMILIES]


@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    folder = build(tmp_path, name)
    lm = opened(folder)
    torch.testing.assert_close(ours(lm), theirs(folder), rtol=0, atol=1e-4)
    assert in_words(lm) == ""


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_before", [True, False])
def test_a_renamed_head_is_found_and_exported_under_the_name_it_had(tmp_path: Path, as_before: bool) -> None:
    folder = build(tmp_path, "gpt_neox", save_original_format=as_before)
    name = "embed_out.weight" if as_before else "lm_head.weight"
    assert name in load_file(folder / "model.safetensors")
    lm = opened(folder)
    assert torch.equal(ours(lm), ours(opened(build(tmp_path / "other", "gpt_neox"))))
    assert lm.names.exported("lm_head.weight") == name
    assert all(lm.names.exported(each) == each for each in lm.model.state_dict() if each != "lm_head.weight")


def test_a_model_that_was_never_stored_is_exported_as_transformers_would_save_it() -> None:
    names = TensorNames(more_families.model("gpt_neox"), ())
    assert names.exported("lm_head.weight") == "embed_out.weight"


def test_a_model_saved_without_its_head_is_found_by_its_prefix(tmp_path: Path) -> None:
    folder = build(tmp_path, "gpt_neox")
    expected = ours(opened(folder))
    change(folder, lambda stored: {name.removeprefix("gpt_neox."): each for name, each in stored.items()})
    lm = opened(folder)
    assert torch.equal(ours(lm), expected)
    assert torch.equal(theirs(folder), expected)
    assert lm.names.exported("gpt_neox.embed_in.weight") == "gpt_neox.embed_in.weight"


def test_of_two_tensors_for_one_place_transformers_choice_is_taken(tmp_path: Path) -> None:
    folder = build(tmp_path, "gpt_neox")
    change(folder, lambda stored: {**stored, "lm_head.weight": stored["embed_out.weight"] + 1})
    lm = opened(folder)
    torch.testing.assert_close(ours(lm), theirs(folder), rtol=0, atol=1e-4)
    assert [(each.stored, each.why) for each in skipped(lm)] == [
        ("lm_head.weight", "lm_head.weight is read from embed_out.weight")
    ]


def test_tensors_made_out_of_others_are_known_by_what_makes_them() -> None:
    config = AutoConfig.for_model("mixtral", **tiny.SIZES, num_local_experts=2, num_experts_per_tok=1)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    experts = "model.layers.0.block_sparse_moe.experts"
    names = TensorNames(
        whole, [f"{experts}.{index}.w{part}.weight" for index in (0, 1) for part in (1, 2, 3)]
    )
    assert names.converted == {
        "model.layers.0.mlp.experts.gate_up_proj": "MergeModulelist and Concatenate",
        "model.layers.0.mlp.experts.down_proj": "MergeModulelist",
    }
    assert names.leftovers == []


def test_a_weight_that_would_have_to_be_made_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = WeightConverter(
        "mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]
    )
    monkeypatch.setattr(names_module, "get_model_conversion_mapping", lambda model, **options: [made])
    folder = build(tmp_path, "llama2")

    def fuse(stored: Tensors) -> Tensors:
        gate, up = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
        fused = torch.cat([stored.pop(gate), stored.pop(up)])
        return {**stored, "model.layers.1.mlp.gate_up.weight": fused}

    change(folder, fuse)
    with pytest.raises(PreflightError, match=r"layers\.1\.mlp\.gate_proj\.weight.*made of others \(Chunk\)"):
        opened(folder)


# -- what is never loaded ------------------------------------------------------------------------------------

WRONG = torch.full((8,), 3.0)
COMPUTED = [
    ("llama2", "model.layers.1.self_attn.rotary_emb.inv_freq", WRONG),
    ("llama2", "model.rotary_emb.inv_freq", WRONG),
    ("llama2", "model.layers.0.self_attn.rotary_emb.cos_cached", torch.ones(1, 1, 16, 16)),
    ("llama2", "rope.freqs", WRONG),
    ("gemma2", "model.embed_tokens.embed_scale", torch.tensor(1.0)),
    ("gpt_neox", "gpt_neox.layers.0.attention.bias", torch.ones(1, 1, 16, 16, dtype=torch.bool)),
    ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", torch.tensor(-1e9)),
    ("gptj", "transformer.h.0.attn.embed_positions", torch.ones(256, 8)),
    ("gptj", "transformer.h.2.attn.bias", torch.ones(1, 1, 16, 16)),
    ("codegen", "transformer.h.1.attn.causal_mask", torch.ones(1, 1, 16, 16)),
    ("xglm", "model.embed_positions.weights", torch.ones(258, 64)),
    ("olmo2", "model.rotary_emb.inv_freq", WRONG),
]


@pytest.mark.parametrize(("name", "tensor", "value"), COMPUTED, ids=lambda value: str(value)[:60])
def test_a_computed_tensor_in_a_checkpoint_is_not_loaded(
    tmp_path: Path, name: str, tensor: str, value: Tensor
) -> None:
    folder = build(tmp_path, name)
    expected = ours(opened(folder))
    change(folder, add(**{tensor: value}))
    lm = opened(folder)
    assert torch.equal(ours(lm), expected)
    torch.testing.assert_close(expected, theirs(folder), rtol=0, atol=1e-4)
    assert [(each.stored, each.why) for each in skipped(lm)] == [(tensor, "computed when the model is built")]
    assert carried(lm) == []


def test_what_nobody_asks_for_is_carried_and_what_a_quantization_left_is_not(tmp_path: Path) -> None:
    folder = build(tmp_path, "llama2")
    extra = {
        "model.layers.3.self_attn.q_proj.weight": torch.randn(4, 6),
        "mtp.norm.weight": torch.randn(6).bfloat16(),
        "score.weight": torch.randn(2, 6),
        "score.bias": torch.arange(2),
    }
    change(folder, add(**extra, **{"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}))
    lm = opened(folder)
    assert {each.name: each.dtype for each in carried(lm)} == {
        "model.layers.3.self_attn.q_proj.weight": "F32",
        "mtp.norm.weight": "BF16",
        "score.weight": "F32",
        "score.bias": "I64",
    }
    for each in carried(lm):
        assert each.name == each.stored
        assert torch.equal(each.load(), extra[each.name])
        assert torch.equal(each.raw(), each.load().reshape(-1).view(torch.uint8))
        assert each.nbytes == len(each.raw())
    assert in_words(lm) == (
        "4 tensors (model.layers.3.self_attn.q_proj.weight, mtp.norm.weight, score.bias, …) carried over as "
        "stored; 1 tensor (model.layers.0.mlp.up_proj.weight_scale) skipped: left behind by a quantization"
    )


def test_a_buffer_that_a_checkpoint_lacks_is_said_to_be_missing(tmp_path: Path) -> None:
    config = AutoConfig.for_model("apertus", **tiny.SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert in_words(opened(tmp_path)) == ""
    lost = "model.layers.1.mlp.act_fn.beta"
    change(tmp_path, lambda stored: {name: each for name, each in stored.items() if name != lost})
    lm = opened(tmp_path)
    assert in_words(lm) == f"1 tensor ({lost}) missing, which keep the values that the model is built with"
    assert lm.load_block(1).get_buffer("mlp.act_fn.beta") == lm.load_block(0).get_buffer("mlp.act_fn.beta")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_larger_model_only_the_language_models_own_tensors_are_carried(
    tmp_path: Path, prefix: str
) -> None:
    folder = build(tmp_path, "gemma3")
    config = json.loads((folder / "config.json").read_text())
    AutoConfig.for_model("gemma3", text_config=config).save_pretrained(folder)
    change(
        folder,
        lambda stored: {
            **{prefix + name.removeprefix("model."): each for name, each in stored.items()},
            "vision_tower.encoder.layers.0.mlp.weight": torch.ones(4, 4),
            "multi_modal_projector.weight": torch.ones(4, 4),
            f"{prefix}layers.3.mlp.up_proj.weight": torch.ones(4, 4),
        },
    )
    lm = opened(folder)
    assert [(each.name, each.stored) for each in carried(lm)] == [
        ("model.layers.3.mlp.up_proj.weight", f"{prefix}layers.3.mlp.up_proj.weight")
    ]
    assert {each.why for each in skipped(lm)} == {"not of the language model"}
    assert len(skipped(lm)) == 2


# -- files ---------------------------------------------------------------------------------------------------


def shards(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """A tiny model in several files, and its index."""
    tiny.build(folder, "llama2", shard_size="100KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return index["weight_map"], files


def put(file: Path, **tensors: Tensor) -> None:
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("place", ["first", "last"])
def test_the_index_decides_which_file_a_tensor_is_read_from(tmp_path: Path, place: str) -> None:
    weight_map, files = shards(tmp_path)
    expected = ours(opened(tmp_path))
    name = next(name for name, file in weight_map.items() if file == files[1].name)
    other = files[0 if place == "first" else -1]
    put(other, **{name: torch.zeros_like(load_file(files[1])[name])})
    lm = opened(tmp_path)
    assert torch.equal(ours(lm), expected)
    assert lm.weights.where(name) == str(files[1])
    assert in_words(lm) == ""


def test_a_tensor_that_the_index_does_not_list_is_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    _, files = shards(tmp_path)
    expected = ours(opened(tmp_path))
    put(files[0], **{"extra.weight": torch.ones(3)})
    lm = opened(tmp_path)
    assert torch.equal(ours(lm), expected)
    assert carried(lm) == []
    assert [(each.stored, each.why) for each in skipped(lm)] == [("extra.weight", "not in the index")]


def test_a_weight_missing_from_the_index_is_found_in_its_files_as_transformers_finds_it(
    tmp_path: Path,
) -> None:
    weight_map, _ = shards(tmp_path)
    expected = ours(opened(tmp_path))
    del weight_map["model.layers.1.mlp.up_proj.weight"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert torch.equal(ours(opened(tmp_path)), expected)
    torch.testing.assert_close(expected, theirs(tmp_path), rtol=0, atol=1e-4)


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    shards(tmp_path)
    one = tiny.build(tmp_path / "one", "llama2", seed=1)
    (one / "model.safetensors").rename(tmp_path / "model.safetensors")
    torch.testing.assert_close(ours(opened(tmp_path)), theirs(tmp_path), rtol=0, atol=1e-4)


# -- types ---------------------------------------------------------------------------------------------------


def retype(file: Path, name: str, stored: str, shape: list[int], content: bytes) -> None:
    """Put a tensor of any type into a file, torch's or not."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    offsets = [len(body), len(body) + len(content)]
    if name in header:  # the place of what was there stays, under a name that no model has
        header[f"{name}.before"] = header[name]
    header[name] = {"dtype": stored, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body + content)


ODD = ["F8_E8M0", "F8_E4M3", "U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F8_E5M2FNUZ", "NEW_TYPE"]


@pytest.mark.parametrize("stored", ODD)
def test_a_type_that_no_weight_has_is_refused_only_where_it_is_needed(tmp_path: Path, stored: str) -> None:
    folder = build(tmp_path, "llama2")
    expected = ours(opened(folder))
    content = (bytes(range(256)) * 256)[: ITEM_BITS.get(stored, 8) * 128 * 64 // 8]
    retype(folder / "model.safetensors", "extra.weight", stored, [128, 64], content)
    lm = opened(folder)
    assert torch.equal(ours(lm), expected)
    (extra,) = carried(lm)
    assert (extra.name, extra.dtype, extra.shape) == ("extra.weight", stored, (128, 64))
    assert bytes(extra.raw().numpy()) == content
    assert describe(str(folder)).architecture.exact

    name = "model.layers.1.mlp.up_proj.weight"
    retype(folder / "model.safetensors", name, stored, [128, 64], content)
    with pytest.raises(PreflightError, match=f"{name}.*stored as {stored}"):
        opened(folder)
