"""What is promised of every row of the table of formats that is a folder in Hugging Face's form, tried with
the grids that it says it holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from packed_models import compare, open_model, packed_blocks, save_model, some_ids, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.architecture.description import describe
from engine.config.formats import FORMATS, Format
from engine.config.grid import BITS, Grid, GridConfig
from engine.export.layout import Layout, form_of, layout_of
from engine.export.result import ExportResult
from engine.models.causal_lm import CausalLM
from engine.plan.export_sizes import exported_bytes, number_bytes
from engine.quant.packed import PackedBlock

SMALL = {"hidden_size": 128, "intermediate_size": 192, "tie_word_embeddings": False}
ROWS = [row for row in FORMATS if isinstance(form_of(row.name), Layout)]
"""Formats in Hugging Face's form; others have tests of their own."""
GRIDS = [
    Grid(bits, group, symmetric) for bits in BITS for group in (32, 64, -1) for symmetric in (False, True)
]


def held(row: Format) -> list[Grid]:
    """Grids to try a format with: every width that it holds, of one also symmetric groups and whole rows."""
    fitting = [grid for grid in GRIDS if not row.lacks(grid)]
    widths = [grid for grid in fitting if grid.group_size == 64 and not grid.symmetric]
    others = [grid for grid in fitting if grid.bits == row.bits[-1] and grid not in widths]
    return widths + [grid for grid in others if grid.symmetric != (grid.group_size == -1)]


CELLS = [(row, grid) for row in ROWS for grid in held(row)]
each_cell = pytest.mark.parametrize(
    ("row", "grid"), CELLS, ids=[f"{r.name}-w{g.bits}g{g.group_size}{'s' * g.symmetric}" for r, g in CELLS]
)
each_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


class Written(NamedTuple):
    lm: CausalLM
    blocks: list[PackedBlock]
    result: ExportResult


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases."""
    return save_model(tmp_path_factory.mktemp("model") / "fp", "qwen2", **SMALL)


def written(model: Path, out: Path, row: Format, grid: Grid, dtype: str = "auto") -> Written:
    source, lm = open_model(model)
    blocks = packed_blocks(lm, grid.bits, grid.group_size, grid.symmetric)
    if row.name in NO_ZERO:
        for block in blocks:
            for weight in block.linears.values():
                weight.zero_point.clamp_(min=1)
    result = write(out, lm, source, blocks.__getitem__, layout=layout_of(row.name), dtype=dtype)
    return Written(lm, blocks, result)


NO_ZERO = ("gptq",)
"""Formats that do not hold a zero point of zero."""


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@each_cell
def test_what_is_written_is_verified_and_as_large_as_planned(
    model: Path, tmp_path: Path, row: Format, grid: Grid
) -> None:
    lm, blocks, result = written(model, tmp_path / "out", row, grid)
    check = compare(result.path, lm, blocks.__getitem__, some_ids(1, 16), layout_of(row.name))
    assert (check.problems, check.verified, check.format) == ((), True, row.name)
    assert check.perplexity_packed == pytest.approx(check.perplexity_trained, rel=0.02)
    stored = tensors_in(result.path)
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    section = GridConfig(bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric)
    arch = describe(str(model)).architecture
    assert exported_bytes(arch, section, row.name) == size
    weight = blocks[1].linears["mlp.down_proj"]
    names = layout_of(row.name).names("model.layers.1.mlp.down_proj", grid)
    assert set(names) == {name for name in stored if name.startswith("model.layers.1.mlp.down_proj.")}
    of_linear = sum(stored[name].numel() * stored[name].element_size() for name in names)
    assert row.linear_bytes(weight.out_features, weight.in_features, grid) == of_linear
    assert "lm_head.weight" in stored
    assert stored["model.layers.0.self_attn.q_proj.bias"].dtype == torch.bfloat16


@each_row
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_each_type_of_the_rest_is_planned_written_and_verified(
    model: Path, tmp_path: Path, row: Format, dtype: str
) -> None:
    grid = held(row)[0]
    lm, blocks, result = written(model, tmp_path / "out", row, grid, dtype)
    check = compare(result.path, lm, blocks.__getitem__, some_ids(1, 16), layout_of(row.name), dtype)
    assert (check.problems, check.verified) == ((), True)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(result.path).values())
    section = GridConfig(bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric)
    arch = describe(str(model)).architecture
    assert exported_bytes(arch, section, row.name, number_bytes(dtype)) == size


@each_row
def test_one_changed_number_in_any_tensor_of_a_linear_is_caught(
    model: Path, tmp_path: Path, row: Format
) -> None:
    grid = held(row)[0]
    lm, blocks, result = written(model, tmp_path / "out", row, grid)
    for name in layout_of(row.name).names("model.layers.1.mlp.up_proj", grid):
        copy = shutil.copytree(result.path, tmp_path / name)
        tensors = load_file(copy / "model.safetensors")
        raw = tensors[name].view(torch.uint8).view(-1)
        raw[0] ^= 1
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        check = compare(copy, lm, blocks.__getitem__, some_ids(1, 8), layout_of(row.name))
        assert not check.verified, name
        assert any("model.layers.1.mlp.up_proj" in problem for problem in check.problems)


@each_row
def test_a_missing_tensor_another_format_and_a_foreign_description_are_caught(
    model: Path, tmp_path: Path, row: Format
) -> None:
    grid = held(row)[0]
    lm, blocks, result = written(model, tmp_path / "out", row, grid)
    config = json.loads((result.path / "config.json").read_text())
    tensors = load_file(result.path / "model.safetensors")

    def problems(changed: object) -> tuple[str, ...]:
        (result.path / "config.json").write_text(json.dumps(changed))
        check = compare(result.path, lm, blocks.__getitem__, some_ids(1, 8), layout_of(row.name))
        assert not check.verified
        assert all(problem and "\n" not in problem for problem in check.problems)
        return check.problems

    if not row.dense:  # which a configuration without a description describes
        assert problems({**config, "quantization": None, "quantization_config": None})
    for said in ([], row.name, {"quant_method": "somebody"}, {"bits": [3]}, {"config_groups": 3}):
        said_twice = dict.fromkeys(("quantization", "quantization_config"), said)
        assert problems({**config, **said_twice})
    for name in layout_of(row.name).names("model.layers.0.self_attn.o_proj", grid):
        left = {key: value for key, value in tensors.items() if key != name}
        save_file(left, result.path / "model.safetensors", {"format": "pt"})
        assert any("model.layers.0.self_attn.o_proj" in problem for problem in problems(config)), name


@each_row
def test_what_it_does_not_hold_is_refused_and_the_nearest_that_does_is_named(row: Format) -> None:
    from engine.config.formats import nearest

    for grid in GRIDS:
        found = nearest(row, grid)
        assert found
        assert found != row.name
        assert not FORMATS[found].lacks(grid)
    assert all(name in FORMATS and name != row.name for name in row.instead)


@each_row
def test_the_card_says_how_it_is_loaded_and_what_does_not_load_it(
    model: Path, tmp_path: Path, row: Format
) -> None:
    grid = held(row)[0]
    result = written(model, tmp_path / "out", row, grid).result
    card = (result.path / "README.md").read_text()
    assert "## Loading" in card
    for text in row.warnings(grid):
        assert text[1:] in card
    assert "{" not in card.partition("## Loading")[2].replace("\n{\n", "")


@each_row
def test_a_tied_head_is_not_written_twice(tmp_path: Path, row: Format) -> None:
    folder = save_model(tmp_path / "fp", "qwen3", **{**SMALL, "tie_word_embeddings": True, "head_dim": 32})
    grid = held(row)[0]
    lm, blocks, result = written(folder, tmp_path / "out", row, grid)
    assert compare(result.path, lm, blocks.__getitem__, some_ids(1, 8), layout_of(row.name)).problems == ()
    stored = tensors_in(result.path)
    assert "lm_head.weight" not in stored
    assert "model.layers.0.self_attn.q_norm.weight" in stored
    assert json.loads((result.path / "config.json").read_text())["tie_word_embeddings"] is True
    assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in result.path.iterdir()}
