"""A packed checkpoint holds exactly what was trained, in the layout other libraries read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from packed_models import (
    GPTQ_V2,
    compare,
    export,
    logits,
    open_model,
    packed_blocks,
    reader_of,
    reload,
    save_model,
    some_ids,
    trained_logits,
    write,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

from engine.config.grid import Grid
from engine.errors import PreflightError
from engine.export.reader import PlainLinear
from engine.export.unpacking import unpack_rows
from engine.quant.grid import initial_range, quantize
from engine.quant.packed import PackedBlock, PackedWeight

STORIES = Path(__file__).parents[2].parent / "shared/models/stories260K"
GRIDS = [(bits, group) for bits in (2, 3, 4, 8) for group in (32, 64, 128, -1)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


def plain_bits(words: list[int], bits: int, count: int) -> list[int]:
    """Element j is bits [b*j, b*j+b) of the stream whose word k holds bits [32k, 32k+32)."""
    stream = sum((word & 0xFFFFFFFF) << (32 * k) for k, word in enumerate(words))
    return [(stream >> (bits * j)) & ((1 << bits) - 1) for j in range(count)]


@pytest.mark.parametrize(("bits", "group"), GRIDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_files_hold_the_trained_integers_bit_for_bit(
    llama: Path, tmp_path: Path, bits: int, group: int, symmetric: bool
) -> None:
    lm, blocks, result = export(llama, tmp_path / "out", bits, group, symmetric)
    check = compare(result.path, lm, blocks.__getitem__, some_ids(1, 16))
    assert check.problems == ()
    assert check.verified
    assert check.max_logit_diff is not None
    assert check.tolerance is not None
    assert check.max_logit_diff <= check.tolerance
    assert check.perplexity_packed == pytest.approx(check.perplexity_trained, rel=1e-2)
    zeros = reader_of(result.path).linear("model.layers.0.self_attn.q_proj").zero_OG
    expected = {2 ** (bits - 1)} if symmetric else {0, 2**bits - 1}
    assert expected <= set(zeros.unique().tolist())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layout_is_the_one_the_format_describes(bits: int) -> None:
    out, inp, group = 32, 64, 32
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (out, inp), generator=draw, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (out, 2), generator=draw, dtype=torch.uint8)
    zero[0], zero[1] = 0, 2**bits - 1
    scale = torch.rand(out, 2, generator=draw)
    tensors = dict(GPTQ_V2.tensors("l", PackedWeight.from_codes(codes, scale, zero, Grid(bits, group))))
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "l.qweight": ((inp * bits // 32, out), torch.int32),
        "l.qzeros": ((2, out * bits // 32), torch.int32),
        "l.scales": ((2, out), torch.float16),
        "l.g_idx": ((inp,), torch.int32),
    }
    for channel in range(out):
        column = tensors["l.qweight"][:, channel].tolist()
        assert plain_bits(column, bits, inp) == codes[channel].tolist()
    for g in range(2):
        assert plain_bits(tensors["l.qzeros"][g].tolist(), bits, out) == zero[:, g].tolist()
    assert torch.equal(tensors["l.scales"], scale.half().T)
    assert tensors["l.g_idx"].tolist() == [i // group for i in range(inp)]


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_weight_is_that_of_its_own_group(groups: int, in_order: bool) -> None:
    draw = torch.Generator().manual_seed(groups)
    codes, zero = (torch.randint(0, 8, (5, n), dtype=torch.uint8, generator=draw) for n in (96, groups))
    scale = torch.rand(5, groups, generator=draw).half()
    group = torch.arange(96, dtype=torch.int32) // (96 // groups)
    if not in_order:
        group = group[torch.randperm(96, generator=draw)]
    weight = PlainLinear(codes, zero, scale, group).weight()
    for o in range(5):
        for i, g in enumerate(group.tolist()):
            want = (codes[o, i].float() - zero[o, g].float()) * scale[o, g].float()
            assert weight[o, i].item() == want.item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_plain_reader_unpacks_the_stream(bits: int) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (5, 3 * bits), dtype=torch.int32)
    expected = [plain_bits(row.tolist(), bits, 96) for row in words]
    assert unpack_rows(words.numpy(), bits).tolist() == expected


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("gemma2", {"head_dim": 64, "sliding_window": 8}),
        ("phi3", {"tie_word_embeddings": False}),
    ],
)
def test_biases_norms_and_embeddings_survive(
    tmp_path: Path, model_type: str, changes: dict[str, object]
) -> None:
    directory = save_model(tmp_path / "fp", model_type, **changes)
    lm, blocks, result = export(directory, tmp_path / "out", 3, 32)
    ids = some_ids()
    assert compare(result.path, lm, blocks.__getitem__, ids).problems == ()
    reader = reader_of(result.path)
    assert ("lm_head.weight" in reader) == (not lm.tied)
    for name, tensor in blocks[1].others.items():
        assert torch.equal(reader.stored(f"model.layers.1.{name}"), tensor.bfloat16())
    reloaded = reload(result.path)
    difference = logits(reloaded, reloaded.load_block, ids) - trained_logits(lm, blocks, ids)
    assert difference.abs().max() < 0.02


def test_configuration_is_the_original_plus_what_loaders_need(llama: Path, tmp_path: Path) -> None:
    _, _, result = export(llama, tmp_path / "out", 2, 64)
    original = json.loads((llama / "config.json").read_text())
    written = json.loads((result.path / "config.json").read_text())
    quantization = written.pop("quantization_config")
    assert {k: written[k] for k in original if k not in ("dtype", "torch_dtype")} == {
        k: v for k, v in original.items() if k not in ("dtype", "torch_dtype")
    }
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert quantization == json.loads((result.path / "quantize_config.json").read_text())
    wanted = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 2, "group_size": 64}
    assert wanted.items() <= quantization.items()
    assert quantization["sym"] is False
    assert quantization["desc_act"] is False
    assert quantization["lm_head"] is False
    present = {path.name for path in result.path.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= present
    assert "model.safetensors.index.json" not in present


@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_rotary_settings_are_read_the_same_by_old_and_new_loaders(tmp_path: Path, rope_type: str) -> None:
    rope: dict[str, object] = {"rope_type": rope_type, "rope_theta": 50000.0}
    if rope_type == "llama3":
        rope |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 64}
    directory = save_model(tmp_path / "fp", rope_parameters=rope)
    _, _, result = export(directory, tmp_path / "out", 4, 64)
    written = json.loads((result.path / "config.json").read_text())
    assert written["rope_theta"] == 50000.0
    assert written.get("rope_scaling", {}).get("factor") == rope.get("factor")
    assert AutoConfig.from_pretrained(result.path).rope_parameters == rope


def test_rows_of_different_length_in_one_group_each_are_group_size_minus_one(
    llama: Path, tmp_path: Path
) -> None:
    _, _, result = export(llama, tmp_path / "out", 4, -1)
    assert json.loads((result.path / "quantize_config.json").read_text())["group_size"] == -1


def test_sizes_are_those_of_the_files(llama: Path, tmp_path: Path) -> None:
    lm, _, result = export(llama, tmp_path / "out", 2, 64)
    assert result.bytes == (result.path / "model.safetensors").stat().st_size
    assert result.fp_bytes == 2 * lm.parameters_count
    assert result.bits_per_weight == pytest.approx(2 + (2 + 16) / 64)


def test_shards_hold_the_same_model(llama: Path, tmp_path: Path) -> None:
    _, _, one = export(llama, tmp_path / "one", 4, 64)
    lm, blocks, many = export(llama, tmp_path / "many", 4, 64, shard_bytes=100_000)
    assert len(many.files) > 3
    index = json.loads((many.path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(many.files)
    whole = load_file(one.path / one.files[0])
    parts: dict[str, Tensor] = {}
    for name in many.files:
        parts.update(load_file(many.path / name))
    assert whole.keys() == parts.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert compare(many.path, lm, blocks.__getitem__, some_ids()).verified


def test_exporting_twice_gives_the_same_bytes_in_every_file(llama: Path, tmp_path: Path) -> None:
    def digests(path: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}

    _, _, first = export(llama, tmp_path / "a", 3, 64, shard_bytes=200_000)
    _, _, second = export(llama, tmp_path / "b", 3, 64, shard_bytes=200_000)
    assert digests(first.path) == digests(second.path)
    export(llama, tmp_path / "a", 3, 64, shard_bytes=200_000)
    assert digests(first.path) == digests(second.path)


def test_an_interrupted_export_leaves_the_previous_one_untouched(llama: Path, tmp_path: Path) -> None:
    _, _, result = export(llama, tmp_path / "out", 2, 64)
    before = (result.path / "model.safetensors").read_bytes()
    source, lm = open_model(llama)
    blocks = packed_blocks(lm, 4, 64)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(result.path, lm, source, blocks.__getitem__, on_block=stop)
    assert (result.path / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_blocks_are_asked_for_once_each_in_order(llama: Path, tmp_path: Path) -> None:
    source, lm = open_model(llama)
    blocks, asked = packed_blocks(lm, 4, 64), []

    def block_for(index: int) -> PackedBlock:
        asked.append(index)
        return blocks[index]

    write(tmp_path / "out", lm, source, block_for)
    assert asked == list(range(lm.blocks))


def test_model_card_has_the_numbers_and_the_command(llama: Path, tmp_path: Path) -> None:
    card = {
        "base_model": "someone/tiny-llama",
        "command": "eqat run demo --bits 3",
        "perplexity": {"fp": 24.88, "rtn": 726605.0, "block_ap": 50.6, "e2e_qp": 38.5, "packed": None},
        "evaluation": "WikiText-2 test, 1024 tokens a window",
        "config": "[grid]\nbits = 3",
    }
    _, _, result = export(llama, tmp_path / "out", 3, 64, card=card)
    text = (result.path / "README.md").read_text()
    assert text.startswith("---\n")
    for part in ("base_model: someone/tiny-llama", card["command"], "24.880", "726,605", "38.500", "3.297"):
        assert part in text
    assert "reloaded" not in text


def test_zero_points_that_do_not_fill_words_are_refused_by_name() -> None:
    weight = PackedWeight.from_codes(
        torch.zeros(8, 64, dtype=torch.uint8),
        torch.ones(8, 1),
        torch.zeros(8, 1, dtype=torch.uint8),
        Grid(2, 64),
    )
    with pytest.raises(PreflightError, match=r"layers\.0\.k_proj: 8 output channels of 2 bits"):
        list(GPTQ_V2.tensors("layers.0.k_proj", weight))


def test_values_beyond_the_stored_type_are_refused_by_name_and_with_what_to_do(
    llama: Path, tmp_path: Path
) -> None:
    source, lm = open_model(llama)
    blocks = packed_blocks(lm, 4, 64)
    blocks[1].others["input_layernorm.weight"][3] = 1e6
    with pytest.raises(
        PreflightError, match=r"model\.layers\.1\.input_layernorm\.weight: holds 1e\+06"
    ) as caught:
        write(tmp_path / "out", lm, source, blocks.__getitem__, dtype="float16")
    assert caught.value.hint == "--set export.dtype=bfloat16"
    assert list(tmp_path.iterdir()) == []


def test_mixed_grids_are_refused(llama: Path, tmp_path: Path) -> None:
    source, lm = open_model(llama)
    blocks = [packed_blocks(lm, 4, 64)[0], packed_blocks(lm, 2, 64)[1]]
    with pytest.raises(PreflightError, match="one grid for the whole model"):
        write(tmp_path / "out", lm, source, blocks.__getitem__)


@pytest.mark.parametrize("grid", [(2, 64, False), (4, 32, False), (4, -1, False), (4, 64, True)])
def test_a_linear_with_a_grid_of_its_own_is_refused_by_name(
    llama: Path, tmp_path: Path, grid: tuple[int, int, bool]
) -> None:
    source, lm = open_model(llama)
    blocks = packed_blocks(lm, 4, 64)
    blocks[1].linears["mlp.up_proj"] = packed_blocks(lm, *grid)[1].linears["mlp.up_proj"]
    with pytest.raises(PreflightError, match="gptq_v2 holds one") as caught:
        write(tmp_path / "out", lm, source, blocks.__getitem__)
    assert caught.value.where == "model.layers.1.mlp.up_proj"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not STORIES.exists(), reason="the shared model stories260K is not here")
def test_a_real_model_keeps_its_predictions_at_8_bits(tmp_path: Path) -> None:
    """Its down_proj has 172 inputs, which no group size divides; whole rows at 8 bits fit."""
    source, lm = open_model(STORIES)
    grid = Grid(8, -1)

    def block_for(index: int) -> PackedBlock:
        module = lm.load_block(index)
        linears = {}
        for name in lm.linear_names(index):
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            scale, zero = initial_range(linear.weight, grid, method="minmax")
            linears[name] = PackedWeight.from_codes(
                quantize(linear.weight, scale, zero, 8), scale, zero, grid
            )
        own = {f"{name}.weight" for name in linears}
        return PackedBlock(linears, {n: p for n, p in module.named_parameters() if n not in own})

    result = write(tmp_path / "out", lm, source, block_for)
    ids = source.tokenizer()("Once upon a time, there was a little girl", return_tensors="pt").input_ids
    check = compare(result.path, lm, block_for, ids)
    assert check.problems == ()
    reloaded = reload(result.path)
    full, packed = logits(lm, lm.load_block, ids), logits(reloaded, reloaded.load_block, ids)
    assert (full.argmax(-1) == packed.argmax(-1)).float().mean() > 0.8
    assert result.bytes < 0.7 * result.fp_bytes
