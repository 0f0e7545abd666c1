"""Checkpoints of anybody as blocks of ours: what their files hold, bit for bit, or why that cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import open_model, packed_blocks, rounded_heads, save_model, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config.grid import Grid
from engine.config.model import ModelConfig
from engine.errors import EqatError, PreflightError
from engine.export.imported import (
    check_whole,
    imported_block,
    imported_heads,
    imported_source,
    quantized_heads,
)
from engine.export.importing import Importable, look_at
from engine.export.judging import judge
from engine.export.layout import form_of
from engine.models.causal_lm import CausalLM
from engine.quant.packed import PackedBlock

FILE = "model.safetensors"
LINEAR = "model.layers.1.mlp.up_proj"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "fp", "llama", tie_word_embeddings=False)


class Maker:
    """Exports of random integers, none of whose zero points is 0, each made once."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.source, self.lm = open_model(model)
        self.folder = folder

    def blocks(self, bits: int, group: int = 64, **options: Any) -> list[PackedBlock]:
        def above_zero(block: PackedBlock) -> PackedBlock:
            linears = {
                name: replace(weight, zero_point=weight.zero_point.clamp(min=1))
                for name, weight in block.linears.items()
            }
            return replace(block, linears=linears)

        return [above_zero(block) for block in packed_blocks(self.lm, bits, group, **options)]

    def __call__(self, name: str, bits: int, group: int = 64, **options: Any) -> Path:
        place = self.folder / f"{name}-{bits}-{group}-{len(options)}"
        if not place.exists():
            blocks = self.blocks(bits, group, **options)
            write(place, self.lm, self.source, blocks.__getitem__, layout=form_of(name))
        return place


@pytest.fixture(scope="module")
def maker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(model, tmp_path_factory.mktemp("exports"))


def changed(
    export: Path,
    place: Path,
    tensors: Callable[[Tensors], object] = lambda tensors: None,
    config: Callable[[dict[str, Any]], object] = lambda config: None,
) -> Path:
    """A copy of an export whose tensors and whose config.json are changed."""
    shutil.copytree(export, place)
    held = load_file(place / FILE)
    tensors(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, place / FILE, {"format": "pt"})
    said = json.loads((place / "config.json").read_text())
    config(said)
    (place / "config.json").write_text(json.dumps(said))
    return place


def blocks_in(path: Path, grid: Grid) -> list[PackedBlock]:
    source = imported_source(ModelConfig(source=str(path)))
    lm = CausalLM(source, torch.device("cpu"), torch.float32)
    return [imported_block(lm, source, index, grid) for index in range(lm.blocks)]


def require_same(found: list[PackedBlock], wanted: list[PackedBlock]) -> None:
    assert len(found) == len(wanted)
    for have, want in zip(found, wanted, strict=True):
        assert have.linears.keys() == want.linears.keys()
        for name, weight in want.linears.items():
            mine = have.linears[name]
            assert torch.equal(mine.words, weight.words), name
            assert torch.equal(mine.zero_point, weight.zero_point), name
            assert torch.equal(mine.scale.view(torch.int16), weight.scale.view(torch.int16)), name
            assert mine.grid == weight.grid
        for name, value in want.others.items():
            assert torch.equal(have.others[name], value.to(have.others[name].dtype)), name


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        (name, bits)
        for name in ("gptq_v2", "gptq", "compressed-tensors", "auto-round", "mlx")
        for bits in (2, 3, 4, 8)
    ]
    + [("awq", 4)],
)
def test_integers_scales_and_zero_points_are_those_of_the_file(maker: Maker, name: str, bits: int) -> None:
    path = maker(name, bits)
    found = look_at(path)
    assert (found.bits, found.group_size, found.symmetric) == (bits, 64, False)
    assert (found.format, found.blocks, found.linears, found.reference) == (name, 2, 14, "")
    require_same(blocks_in(path, Grid(bits, 64)), maker.blocks(bits))


@pytest.mark.parametrize("name", ["gptq_v2", "compressed-tensors", "auto-round"])
@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({"symmetric": True}, Grid(3, 64, True)),
        ({"bits": 2, "fixed": 1}, Grid(2, 64, False, 1)),
        ({"group": -1}, Grid(3, -1)),
    ],
)
def test_a_grid_is_recognized(maker: Maker, name: str, options: dict[str, Any], grid: Grid) -> None:
    path = maker(name, **{"bits": 3, **options})
    found = look_at(path)
    fixed = grid.fixed_zero_point is not None and not grid.symmetric
    assert (found.bits, found.group_size, found.symmetric) == (grid.bits, grid.group_size, grid.symmetric)
    assert found.zero_point == ("fixed" if fixed else "learned")
    require_same(blocks_in(path, grid), maker.blocks(**{"bits": 3, **options}))


@pytest.mark.parametrize(("options", "grid"), [({"symmetric": True}, Grid(3, 64, True)), ({}, Grid(3, 64))])
def test_biases_of_mlx_are_zero_points_where_they_can_be(
    maker: Maker, tmp_path: Path, options: dict[str, Any], grid: Grid
) -> None:
    path = maker("mlx", 3, **options)
    assert look_at(path).symmetric == grid.symmetric
    require_same(blocks_in(path, grid), maker.blocks(3, **options))
    for number, wrong in enumerate((1e-3, 1.0, -100.0)):
        moved = changed(path, tmp_path / str(number), set_(f"{LINEAR}.biases", lambda t, by=wrong: t + by))
        assert re.search(r"up_proj: \d+ of 1536 biases are no zero points", refusal(moved))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("bits", "fixed"), [(8, False), (4, False), (4, True)])
def test_a_quantized_embedding_and_head_are_taken_over(
    tmp_path: Path, bits: int, fixed: bool, tied: bool
) -> None:
    source, lm = open_model(save_model(tmp_path / "fp", tie_word_embeddings=tied))
    blocks, heads = packed_blocks(lm, 3, 64, symmetric=fixed), rounded_heads(lm, bits, 64, fixed)
    path = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=form_of("mlx"), heads=heads).path
    found = look_at(path, str(tmp_path / "fp"))
    assert (found.bits, found.head_bits, found.symmetric) == (3, bits, fixed)
    assert found.reference == str(tmp_path / "fp")
    held = imported_source(ModelConfig(source=str(path)))
    opened = CausalLM(held, torch.device("cpu"), torch.float32)
    names = quantized_heads(opened, held)
    taken = imported_heads(held, names, next(iter(heads.values())).grid)
    assert taken.keys() == heads.keys()
    require_same([PackedBlock(taken)], [PackedBlock(heads)])
    require_same(blocks_in(path, Grid(3, 64, fixed)), blocks)
    with pytest.raises(PreflightError, match="lies outside of the blocks"):
        check_whole(opened, held)


# -- files that are not written as ours ----------------------------------------------------------------


def ten_a_word(values_XN: Tensor, bits: int) -> Tensor:
    """As EfficientQAT packs along the last dimension: whole integers, the upper bits of a word unused."""
    count, each = values_XN.shape[-1], 32 // bits
    padded = torch.nn.functional.pad(values_XN.long(), (0, -count % each))
    fields = padded.reshape(len(padded), -1, each) << torch.arange(each) * bits
    return fields.sum(-1).to(torch.int32)


def efficientqat(maker: Maker, place: Path, bits: int) -> Path:
    """The files of EfficientQAT: GPTQ's names, and a config.json that says nothing of them."""
    blocks = maker.blocks(bits)

    def pack(tensors: Tensors) -> None:
        for index, block in enumerate(blocks):
            for name, weight in block.linears.items():
                linear = f"model.layers.{index}.{name}"
                tensors[f"{linear}.qweight"] = ten_a_word(weight.codes(), bits).t()
                tensors[f"{linear}.qzeros"] = ten_a_word(weight.zero_point.t(), bits)

    made = changed(maker("gptq_v2", bits), place, pack, lambda config: config.pop("quantization_config"))
    (made / "quantize_config.json").unlink()
    return made


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_files_of_efficientqat_are_read_although_nothing_says_how(
    maker: Maker, tmp_path: Path, bits: int
) -> None:
    path = efficientqat(maker, tmp_path / "out", bits)
    rows = load_file(path / FILE)[f"{LINEAR}.qweight"].shape[0]
    assert rows == {2: 16, 3: 26, 4: 32}[bits]
    assert look_at(path).bits == bits
    assert judge(path).problems == []
    require_same(blocks_in(path, Grid(bits, 64)), maker.blocks(bits))


def test_an_early_gptq_file_describes_itself_elsewhere_and_has_biases_of_zeros(
    maker: Maker, tmp_path: Path
) -> None:
    def biases(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".qweight")]:
            tensors[name.replace("qweight", "bias")] = torch.zeros(tensors[name].shape[1]).half()

    place = changed(maker("gptq", 4), tmp_path / "out", biases, lambda said: said.pop("quantization_config"))
    said = {"bits": 4, "group_size": 64, "damp_percent": 0.01, "desc_act": False, "sym": False}
    (place / "quantize_config.json").write_text(json.dumps(said))
    assert look_at(place).format == "gptq"
    require_same(blocks_in(place, Grid(4, 64)), maker.blocks(4))
    one = changed(place, tmp_path / "one", lambda tensors: tensors[f"{LINEAR}.bias"].add_(1))
    with pytest.raises(PreflightError, match="is a bias that the model has no place for"):
        look_at(one)


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"])
def test_other_packings_of_auto_round_are_read(maker: Maker, tmp_path: Path, packing: str) -> None:
    written = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq", "auto_round": "gptq_v2"}[packing]

    def describe(config: dict[str, Any]) -> None:
        config["quantization_config"] = {
            "quant_method": "auto-round",
            "bits": 4,
            "group_size": 64,
            "sym": False,
            "data_type": "int",
            "packing_format": packing,
        }

    def without_groups(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            del tensors[name]

    path = changed(maker(written, 4), tmp_path / "out", without_groups, describe)
    assert look_at(path).format == "auto-round"
    require_same(blocks_in(path, Grid(4, 64)), maker.blocks(4))


def test_compressed_tensors_of_older_releases_and_scales_of_bfloat16_are_read(
    maker: Maker, tmp_path: Path
) -> None:
    blocks = maker.blocks(3)

    def pack(tensors: Tensors) -> None:
        for index, block in enumerate(blocks):
            for name, weight in block.linears.items():
                linear = f"model.layers.{index}.{name}"
                scale = weight.scale.to(torch.bfloat16)
                block.linears[name] = replace(weight, scale=scale.half())
                tensors[f"{linear}.weight_packed"] = ten_a_word(weight.codes(), 3)
                tensors[f"{linear}.weight_zero_point"] = ten_a_word(weight.zero_point.t(), 3).t()
                tensors[f"{linear}.weight_scale"] = scale

    path = changed(maker("compressed-tensors", 3), tmp_path / "out", pack)
    assert look_at(path).bits == 3
    require_same(blocks_in(path, Grid(3, 64)), blocks)


def test_scales_below_zero_stay_what_they_are(maker: Maker, tmp_path: Path) -> None:
    """auto-round makes them on symmetric grids: as many as not."""
    blocks = maker.blocks(4, symmetric=True)
    for block in blocks:
        for name, weight in block.linears.items():
            turned = torch.where(torch.arange(weight.scale.shape[1]) % 2 == 0, 1, -1).half()
            block.linears[name] = replace(weight, scale=weight.scale * turned)

    def turn(tensors: Tensors) -> None:
        for index, block in enumerate(blocks):
            for name, weight in block.linears.items():
                tensors[f"model.layers.{index}.{name}.scales"] = weight.scale.t()

    path = changed(maker("auto-round", 4, symmetric=True), tmp_path / "out", turn)
    assert look_at(path).symmetric
    require_same(blocks_in(path, Grid(4, 64, True)), blocks)


# -- the original model --------------------------------------------------------------------------------


def test_the_original_is_the_one_that_is_named_or_that_the_checkpoint_names(
    model: Path, maker: Maker, tmp_path: Path
) -> None:
    path = maker("gptq_v2", 4)
    assert look_at(path, str(model)).reference == str(model)
    naming = changed(path, tmp_path / "naming", config=lambda said: said.update(_name_or_path=str(model)))
    assert look_at(naming).reference == str(model)
    itself = tmp_path / "itself"
    changed(path, itself, config=lambda said: said.update(_name_or_path=str(itself)))
    assert look_at(itself).reference == ""
    for name in ("nobody/no-such-model", "../fp", "fp", 3, "a\nb", "/nowhere", {"a": 1}):
        said = json.loads((naming / "config.json").read_text())
        (naming / "config.json").write_text(json.dumps({**said, "_name_or_path": name}))
        assert look_at(naming).reference == ""


def test_another_model_is_no_original(maker: Maker, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = save_model(tmp_path / "other", "llama", tie_word_embeddings=False)
    held = load_file(other / FILE)
    held["model.norm.weight"] += 1
    save_file(held, other / FILE, {"format": "pt"})
    with pytest.raises(PreflightError, match=r"its model\.norm\.weight is not that of the checkpoint"):
        look_at(maker("gptq_v2", 4), str(other))
    deeper = save_model(tmp_path / "deeper", "llama", num_hidden_layers=3)
    with pytest.raises(PreflightError, match="it has 3 blocks"):
        look_at(maker("gptq_v2", 4), str(deeper))


# -- what is refused -----------------------------------------------------------------------------------


def set_(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value(tensors[name].clone())})


def first(number: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = number
        return tensor

    return put


def head(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]
    for part, columns in (("qweight", 320), ("qzeros", 40), ("scales", 320)):
        tensors[f"lm_head.{part}"] = tensors[f"{LINEAR}.{part}"][:, :columns]
    tensors["lm_head.g_idx"] = tensors[f"{LINEAR}.g_idx"].clone()


def smaller_groups(tensors: Tensors) -> None:
    for part in ("qzeros", "scales"):
        tensors[f"{LINEAR}.{part}"] = tensors[f"{LINEAR}.{part}"].repeat_interleave(2, 0)
    tensors[f"{LINEAR}.g_idx"] = torch.arange(256, dtype=torch.int32) // 32


def dense(tensors: Tensors) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors.pop(f"{LINEAR}.{part}")
    tensors[f"{LINEAR}.weight"] = torch.zeros(384, 256)


REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "activation order": (
        set_(f"{LINEAR}.g_idx", lambda g: g.flip(0)),
        r"up_proj: its inputs are in activation",
    ),
    "a scale that is none": (
        set_(f"{LINEAR}.scales", first(float("nan"))),
        "1 of 1536 scales are not finite",
    ),
    "a scale of zero": (set_(f"{LINEAR}.scales", first(0.0)), "1 of 1536 scales are zero"),
    "a scale beyond float16": (
        set_(f"{LINEAR}.scales", lambda s: first(1e6)(s.float())),
        "1 of 1536 scales do not fit float16",
    ),
    "a scale between float16": (
        set_(f"{LINEAR}.scales", lambda s: first(1 / 3)(s.float())),
        "1 of 1536 scales do not fit float16",
    ),
    "a quantized head": (head, "lm_head: is quantized, and lies outside of the blocks"),
    "no integers": (lambda tensors: tensors.pop(f"{LINEAR}.qweight"), "up_proj"),
    "no zero points": (lambda tensors: tensors.pop(f"{LINEAR}.qzeros"), r"up_proj\.qzeros"),
    "no scales": (lambda tensors: tensors.pop(f"{LINEAR}.scales"), r"up_proj\.scales"),
    "no norm": (lambda tensors: tensors.pop("model.norm.weight"), r"model\.norm\.weight"),
    "words of another length": (
        set_(f"{LINEAR}.qzeros", lambda z: z[:, :-1]),
        "the tensors of model.layers.1.mlp.up_proj do not fit each other",
    ),
    "words of another type": (set_(f"{LINEAR}.qzeros", lambda z: z.float()), "words of type float32"),
    "too few groups": (set_(f"{LINEAR}.scales", lambda s: s[:1]), "do not fit"),
    "several grids": (smaller_groups, "a checkpoint of several grids cannot be imported"),
    "a linear that is not quantized": (dense, "only a checkpoint whose blocks are quantized as a whole"),
    "a norm that is not finite": (
        set_("model.layers.0.input_layernorm.weight", first(float("inf"))),
        "holds NaN or infinity",
    ),
}


def refusal(path: Path) -> str:
    with pytest.raises(EqatError) as caught:
        look_at(path)
    assert int(caught.value.exit_code) == 3
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_run_cannot_go_on_from_is_refused_by_its_name(maker: Maker, tmp_path: Path, what: str) -> None:
    change, words = REFUSED[what]
    path = changed(maker("gptq_v2", 4), tmp_path / "out", change)

    assert re.search(words, refusal(path)), refusal(path)


DESCRIBED: dict[str, tuple[str, dict[str, Any], str]] = {
    "five bits": ("gptq_v2", {"bits": 5}, "5 is no number of bits"),
    "an unknown version": ("gptq_v2", {"checkpoint_format": "bitblas", "format": "bitblas"}, "bitblas"),
    "Marlin's words": ("gptq", {"is_marlin_format": True}, "Marlin"),
    "words of 16 bits": ("gptq_v2", {"pack_dtype": "int16"}, "not of 32 bits"),
    "no zero points": ("awq", {"zero_point": False}, "no zero points"),
    "another version of AWQ": ("awq", {"version": "gemv"}, "gemv of awq"),
    "a cache in 8 bits": ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "cache of keys"),
    "rotated weights": ("compressed-tensors", {"transform_config": {"config_groups": {}}}, "transformed"),
    "sparse weights": ("compressed-tensors", {"sparsity_config": {"format": "sparse-24"}}, "sparse"),
    "another layout": ("compressed-tensors", {"format": "marlin-24"}, "marlin-24"),
    "nobody's": ("gptq_v2", {"quant_method": "x", "checkpoint_format": "x", "format": "x"}, "'x'"),
}


@pytest.mark.parametrize("what", DESCRIBED)
def test_a_description_of_something_else_is_refused_by_its_name(
    maker: Maker, tmp_path: Path, what: str
) -> None:
    name, change, words = DESCRIBED[what]
    path = changed(
        maker(name, 4), tmp_path / "out", config=lambda said: said["quantization_config"].update(change)
    )
    assert words in refusal(path)


def test_what_is_no_checkpoint_to_import_is_refused_by_its_name(
    model: Path, maker: Maker, tmp_path: Path
) -> None:
    assert "it is not quantized" in refusal(model)
    assert "cannot be imported from" in refusal(maker("gguf", 4))
    assert "is not there" in refusal(tmp_path / "nowhere") or "does not exist" in refusal(
        tmp_path / "nowhere"
    )
    cut = shutil.copytree(maker("gptq_v2", 4), tmp_path / "cut")
    os.truncate(cut / FILE, (cut / FILE).stat().st_size - 100)
    assert FILE in refusal(cut)
    other = changed(maker("gptq_v2", 4), tmp_path / "other", config=lambda said: said.update(hidden_size=128))
    assert "config.json asks for" in refusal(other)


def test_what_was_found_says_which_format_it_is(maker: Maker) -> None:
    assert isinstance(look_at(maker("awq", 4)), Importable)
