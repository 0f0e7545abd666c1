"""AWQ, auto-round, GPTQ v1, MLX and plain checkpoints lie in the files as their loaders read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_models import (
    compare,
    open_model,
    packed_blocks,
    random_weight,
    save_model,
    some_ids,
    write,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.architecture.description import describe
from engine.architecture.refusals import refuse
from engine.config.formats import FORMATS
from engine.config.grid import Grid, GridConfig
from engine.errors import PreflightError
from engine.export.layout import Linear, layout_of
from engine.models.carried import carried
from engine.quant.packed import PackedBlock, PackedWeight


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


def written(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    return dict(layout_of(name).tensors("l", weight))


def fields(words: Tensor, bits: int) -> list[list[int]]:
    """The numbers along each row: element j is bits [b*j, b*j+b) of its stream."""
    rows = words.view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
    streams = [sum(int(word) << (32 * k) for k, word in enumerate(row)) for row in rows]
    count = rows.shape[1] * 32 // bits
    return [[(stream >> (bits * j)) & ((1 << bits) - 1) for j in range(count)] for stream in streams]


# -- AWQ -------------------------------------------------------------------------------------------


def test_awq_words_hold_eight_outputs_in_the_order_of_its_kernels() -> None:
    weight = random_weight(16, 64, 4, 32, False, seed=1)
    tensors = written("awq", weight)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "l.qweight": ((64, 2), torch.int32),
        "l.qzeros": ((2, 2), torch.int32),
        "l.scales": ((2, 16), torch.float16),
    }
    for name, values in (("l.qweight", weight.codes()), ("l.qzeros", weight.zero_point)):
        for row, found in enumerate(fields(tensors[name], 4)):
            for word in range(2):
                # AutoAWQ's own table for unpacking: the field in which each output of a word is.
                outputs = [found[8 * word + place] for place in (0, 4, 1, 5, 2, 6, 3, 7)]
                assert outputs == values[8 * word : 8 * word + 8, row].tolist()
    assert torch.equal(tensors["l.scales"], weight.scale.T)


def test_awq_is_refused_where_it_does_not_fit_and_what_does_is_named(llama: Path) -> None:
    described = describe(str(llama))
    for bits in (2, 3, 8):
        with pytest.raises(PreflightError, match=f"AWQ cannot hold {bits} bits") as caught:
            refuse(described.architecture, described.config, GridConfig(bits=bits, group_size=64), ["awq"])
        assert caught.value.hint.startswith("compressed-tensors can; or ")
    with pytest.raises(PreflightError, match="4 bits, and eight outputs a word"):
        written("awq", random_weight(12, 64, 4, 32, False, seed=1))


# -- auto-round ------------------------------------------------------------------------------------


def test_auto_round_has_the_words_of_gptq_v2_and_a_configuration_of_its_own(llama: Path) -> None:
    weight = random_weight(32, 64, 3, 32, False, seed=2)
    ours, theirs = written("auto-round", weight), written("gptq_v2", weight)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert theirs.keys() - ours.keys() == {"l.g_idx"}
    said = layout_of("auto-round").config({"model.layers.0.mlp.l": Linear.of(weight)})
    assert said["block_name_to_quantize"] == "model.layers"
    assert (said["packing_format"], said["sym"]) == ("auto_round:gptqmodel", False)


# -- GPTQ v1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_stores_zero_points_less_one(bits: int) -> None:
    weight = random_weight(32, 64, bits, 32, False, seed=3)
    weight.zero_point.clamp_(min=1)
    v1, v2 = written("gptq", weight), written("gptq_v2", weight)
    assert v1.keys() == v2.keys()
    assert all(torch.equal(v1[name], v2[name]) for name in v1 if name != "l.qzeros")
    assert fields(v1["l.qzeros"], bits) == (weight.zero_point.T.int() - 1).tolist()


def test_gptq_counts_the_zero_points_that_it_cannot_hold_before_it_writes(
    llama: Path, tmp_path: Path
) -> None:
    source, lm = open_model(llama)
    blocks = packed_blocks(lm, 3, 64)
    points = [weight.zero_point for block in blocks for weight in block.linears.values()]
    zeros, groups = sum(int((each == 0).sum()) for each in points), sum(each.numel() for each in points)
    with pytest.raises(
        PreflightError, match=f"^export gptq: {zeros} of {groups} zero points are 0"
    ) as caught:
        write(tmp_path / "out", lm, source, blocks.__getitem__, layout=layout_of("gptq"))
    assert caught.value.hint.startswith("choose gptq_v2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_names_gptqmodel_only_where_it_is_asked_for_by_it(symmetric: bool) -> None:
    weight = random_weight(32, 64, 4, 32, symmetric, seed=3)
    said = layout_of("gptq").config({"model.layers.0.l": Linear.of(weight)})
    assert (said["checkpoint_format"], said["sym"]) == ("gptq", symmetric)
    makers = [each.partition(":")[0] for each in said["meta"]["quantizer"]]
    assert makers == (["eqat"] if symmetric else ["eqat", "gptqmodel"])


# -- MLX -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mlx_words_run_along_inputs_and_scale_and_bias_give_the_very_weight(bits: int) -> None:
    weight = random_weight(8, 64, bits, 32, False, seed=bits)
    tensors = written("mlx", weight)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "l.weight": ((8, 2 * bits), torch.uint32),
        "l.scales": ((8, 2), torch.float32),
        "l.biases": ((8, 2), torch.float32),
    }
    codes = fields(tensors["l.weight"], bits)
    assert codes == weight.codes().tolist()
    scale, bias = (tensors[f"l.{name}"].repeat_interleave(32, 1) for name in ("scales", "biases"))
    assert torch.equal(torch.tensor(codes) * scale + bias, weight.dequantize())
    assert not torch.signbit(tensors["l.biases"][weight.zero_point == 0]).any()


def test_mlx_files_say_so_and_leave_what_is_no_part_of_the_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "fp")
    file = folder / "model.safetensors"
    extra = {"mtp.fc.weight": torch.ones(30, 20)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    source, lm = open_model(folder)
    assert [each.name for each in carried(lm)] == ["mtp.fc.weight"]
    blocks, mlx = packed_blocks(lm, 3, 64), layout_of("mlx")
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=mlx)
    assert compare(result.path, lm, blocks.__getitem__, some_ids(1, 8), mlx).problems == ()
    with safe_open(result.path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "mlx"}
        assert not extra.keys() & set(opened.keys())
    said = json.loads((result.path / "config.json").read_text())
    assert said["quantization"] == {"group_size": 64, "bits": 3, "mode": "affine"}
    assert said["quantization_config"] == said["quantization"]
    assert "library_name: mlx" in (result.path / "README.md").read_text()
    assert result.bits_per_weight == pytest.approx(3 + 64 / 64)


@pytest.mark.parametrize("group", [256, -1])
def test_mlx_holds_no_other_groups(group: int) -> None:
    assert FORMATS["mlx"].lacks(Grid(4, group))


# -- plain -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_plain_checkpoint_holds_each_weight_rounded_once(
    llama: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    source, lm = open_model(llama)
    blocks, hf = packed_blocks(lm, 3, 64), layout_of("hf")
    asked = str(dtype).removeprefix("torch.")
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=hf, dtype=asked)
    stored = load_file(result.path / "model.safetensors")
    for index, block in enumerate(blocks):
        for name, weight in block.linears.items():
            size, codes = weight.group_size, weight.codes().double()
            zero, scale = (
                each.double().repeat_interleave(size, 1) for each in (weight.zero_point, weight.scale)
            )
            exact = (codes - zero) * scale
            assert torch.equal(stored[f"model.layers.{index}.{name}.weight"], exact.to(dtype))
    config = json.loads((result.path / "config.json").read_text())
    assert "quantization_config" not in config
    check = compare(result.path, lm, blocks.__getitem__, some_ids(1, 16), hf, asked)
    assert check.verified
    said = "" if dtype == torch.float32 else f"each weight is rounded once to {asked}"
    assert check.rounded.partition(";")[0] == said
    assert result.bits_per_weight == 8 * dtype.itemsize


def test_a_weight_that_float16_cannot_hold_is_found_before_it_is_written(llama: Path, tmp_path: Path) -> None:
    source, lm = open_model(llama)
    blocks, hf = packed_blocks(lm, 8, 64), layout_of("hf")
    weight = blocks[1].linears["mlp.up_proj"]
    weight.scale[0, 0], weight.zero_point[0, 0] = 60000.0, 0
    with pytest.raises(PreflightError, match=r"a weight is \d.*, and float16 ends at 6\.55e\+04") as caught:
        write(tmp_path / "out", lm, source, blocks.__getitem__, layout=hf, dtype="float16")
    assert caught.value.hint == "--set export.dtype=bfloat16"
    assert list(tmp_path.iterdir()) == []


def test_rounded_weights_are_not_taken_for_other_logits(llama: Path, tmp_path: Path) -> None:
    """The logits are those of the files' weights; weights that are off by more than the rounding are seen."""
    source, lm = open_model(llama)
    blocks, hf = packed_blocks(lm, 2, 64), layout_of("hf")
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=hf)
    check = compare(result.path, lm, blocks.__getitem__, some_ids(), hf)
    assert check.verified
    assert check.max_logit_diff is not None
    assert check.max_logit_diff < 1e-3
    other = [PackedBlock(packed_blocks(lm, 2, 32)[0].linears, blocks[0].others), blocks[1]]
    assert "logits differ" in " ".join(compare(result.path, lm, other.__getitem__, some_ids(), hf).problems)
