"""A format is one row and one file: what the table holds is exported, verified, refused and shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packed_models import (
    compare,
    logits,
    open_model,
    packed_blocks,
    reload,
    save_model,
    some_ids,
    trained_logits,
    write,
)
from safetensors.torch import load_file, save_file
from toy_format import ROW
from typer.testing import CliRunner

from engine.architecture.description import describe
from engine.architecture.refusals import refuse
from engine.config.derived import resolve
from engine.config.formats import FORMATS, refuse_unheld
from engine.config.grid import Grid, GridConfig
from engine.config.loading import load
from engine.config.validation import validate
from engine.errors import PreflightError, UsageError
from engine.export.layout import layout_of
from engine.models.causal_lm import CausalLM
from engine.quant.packed import PackedBlock
from engine.run import contents
from eqat_tui.cli import app
from eqat_tui.views.result import loading_snippet


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    FORMATS.register(ROW)
    yield
    FORMATS.unregister(ROW.name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "fp", "qwen2", tie_word_embeddings=False)


def mixed(lm: CausalLM) -> list[PackedBlock]:
    """Blocks whose linears have grids of 2, 3 and 4 bits and groups of 32 and 64."""
    kinds = [packed_blocks(lm, bits, group) for bits, group in ((2, 64), (3, 32), (4, 64))]
    blocks = []
    for index in range(lm.blocks):
        names = lm.linear_names(index)
        linears = {name: kinds[i % 3][index].linears[name] for i, name in enumerate(names)}
        blocks.append(PackedBlock(linears, kinds[0][index].others))
    return blocks


def test_a_format_of_another_package_is_exported_and_verified(model: Path, tmp_path: Path) -> None:
    source, lm = open_model(model)
    blocks, toy, ids = mixed(lm), layout_of("toy"), some_ids()
    result = write(tmp_path / "toy", lm, source, blocks.__getitem__, layout=toy, card={"command": "eqat"})
    check = compare(result.path, lm, blocks.__getitem__, ids, layout=toy)
    assert (check.problems, check.verified, check.format, result.format) == ((), True, "toy", "toy")
    stored = load_file(result.path / "model.safetensors")
    for index, block in enumerate(blocks):
        for name, weight in block.linears.items():
            prefix = f"{lm.block_prefix(index)}.{name}"
            assert torch.equal(stored[f"{prefix}.codes"], weight.codes())
            assert torch.equal(stored[f"{prefix}.zeros"], weight.zero_point)
            assert torch.equal(stored[f"{prefix}.steps"], weight.scale)
            assert f"{prefix}.weight" not in stored
    again = reload(result.path, toy)
    difference = logits(again, again.load_block, ids) - trained_logits(lm, blocks, ids)
    assert difference.abs().max() < 0.02
    grids = json.loads((result.path / "config.json").read_text())["quantization_config"]["grids"]
    assert grids == {
        f"{lm.block_prefix(index)}.{name}": [weight.bits, weight.group_size]
        for index, block in enumerate(blocks)
        for name, weight in block.linears.items()
    }
    assert json.loads((result.path / "toy.json").read_text()) == {"linears": len(grids)}
    assert not (result.path / "quantize_config.json").exists()


def test_a_model_card_says_which_grids_there_are_and_how_the_format_is_loaded(
    model: Path, tmp_path: Path
) -> None:
    source, lm = open_model(model)
    write(tmp_path / "toy", lm, source, mixed(lm).__getitem__, layout=layout_of("toy"))
    lines = (tmp_path / "toy" / "README.md").read_text().splitlines()
    assert "# unnamed model, 2 and 3 and 4 bits, groups of 32 and 64" in lines
    assert [line for line in lines if line.startswith("- ")] == [
        "- eqat",
        "- toy",
        "- 2-bit",
        "- 3-bit",
        "- 4-bit",
    ]
    assert lines[-1] == "Nobody loads 14 linears of model.layers."


@pytest.mark.parametrize("part", ["codes", "zeros", "steps", "config.json", "toy.json"])
def test_what_differs_in_another_format_is_caught(model: Path, tmp_path: Path, part: str) -> None:
    source, lm = open_model(model)
    blocks, toy = mixed(lm), layout_of("toy")
    result = write(tmp_path / "toy", lm, source, blocks.__getitem__, layout=toy)
    if part.endswith(".json"):
        content = json.loads((result.path / part).read_text())
        content.get("quantization_config", content)["linears"] = 3
        (result.path / part).write_text(json.dumps(content))
        says = f"{part} does not describe the trained grid"
    else:
        tensors = load_file(result.path / "model.safetensors")
        changed = tensors[f"model.layers.1.mlp.up_proj.{part}"]
        changed.view(-1)[5] += 1
        save_file(tensors, result.path / "model.safetensors", {"format": "pt"})
        words = {"codes": "integers", "zeros": "zero points", "steps": "scales"}
        says = f"model.layers.1.mlp.up_proj: 1 {words[part]} differ, by up to 1"
    check = compare(result.path, lm, blocks.__getitem__, some_ids(1, 8), layout=toy)
    assert not check.verified
    assert says in check.problems


def test_what_a_format_cannot_hold_is_refused_before_the_run(model: Path) -> None:
    described = describe(str(model))
    cases = {
        "cannot hold 8 bits": GridConfig(bits=8, group_size=32),
        "cannot hold groups of 128": GridConfig(bits=4, group_size=128),
        "cannot hold one group a row": GridConfig(bits=4, group_size=-1),
        "cannot hold a symmetric grid": GridConfig(bits=4, group_size=32, symmetric=True),
    }
    for words, grid in cases.items():
        refuse(described.architecture, described.config, grid, ["gptq_v2"])
        with pytest.raises(PreflightError, match=words) as caught:
            refuse(described.architecture, described.config, grid, ["gptq_v2", "toy"])
        assert caught.value.where == "export.formats"
        assert "leave toy out" in caught.value.hint
    refuse(described.architecture, described.config, GridConfig(bits=4, group_size=32), ["toy"])


@pytest.mark.parametrize(
    ("name", "grid", "says"),
    [
        ("awq", {"bits": 2}, "AWQ cannot hold 2 bits (compressed-tensors can)"),
        ("onnx", {"bits": 3}, "ONNX cannot hold 3 bits"),
        ("mlx", {"bits": 4, "group_size": 256}, "MLX cannot hold groups of 256 (compressed-tensors can)"),
        ("awq", {"bits": 4, "head_bits": 8}, "of 8 bits (grid.head_bits) (gguf can)"),
    ],
)
def test_what_a_finished_run_cannot_be_written_in_is_told_with_what_it_can(
    name: str, grid: dict[str, int], says: str
) -> None:
    refuse_unheld("--format", ["gguf"], GridConfig(**grid))  # type: ignore[arg-type]
    with pytest.raises(PreflightError) as caught:
        refuse_unheld("--format", ["gguf", name], GridConfig(**grid))  # type: ignore[arg-type]
    assert str(caught.value).startswith("--format: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(("fixed", "warned"), [(None, True), (1, False), (2, False)])
def test_only_zero_points_that_may_become_0_are_warned_of(fixed: int | None, warned: bool) -> None:
    said = FORMATS["gptq"].warnings(Grid(2, 64, fixed_zero_point=fixed))
    assert any("zero point of 0" in sentence for sentence in said) == warned


def test_only_names_of_the_table_are_formats() -> None:
    validate(resolve(load("smoke", overrides={"export.formats": ["toy"]})))
    with pytest.raises(UsageError) as caught:
        validate(resolve(load("smoke", overrides={"export.formats": ["toy", "x"]})))
    known = ", ".join(FORMATS.names())
    assert known.endswith(", toy")
    assert str(caught.value) == f"export.formats[1]: cannot be 'x' (a list, each one of {known})"
    refused = CliRunner().invoke(app, ["export", "no-run", "--format", "x"])
    assert isinstance(refused.exception, UsageError)
    assert str(refused.exception) == f"--format: there is no format 'x' ({known})"


def test_folders_of_every_format_belong_in_a_run() -> None:
    for name in ("toy", "toy.partial", "toy.old", "toy.failed", "gptq_v2", "gptq_v2.failed"):
        assert contents.belongs_in("export", name)
    for name in ("toys", "toy.txt", "toy.partial.old", "no-such-format"):
        assert not contents.belongs_in("export", name)


def test_a_format_says_how_others_load_it() -> None:
    assert loading_snippet("runs/x", "toy") == 'import toy\nmodel = toy.load("runs/x")'
    assert loading_snippet("runs/x").splitlines()[2].startswith("model = AutoModelForCausalLM")
    assert loading_snippet("runs/x", "unknown").splitlines()[1:] == ['path = "runs/x"']


@pytest.mark.parametrize("format", ["gptq_v2", "toy"])
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 32), (4, 64)])
def test_the_bytes_of_a_linear_are_those_in_the_file(
    model: Path, tmp_path: Path, format: str, bits: int, group: int
) -> None:
    source, lm = open_model(model)
    layout = layout_of(format)
    blocks = packed_blocks(lm, bits, group)
    weight = blocks[1].linears["mlp.down_proj"]
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=layout)
    stored = load_file(result.path / "model.safetensors")
    names = layout.names("model.layers.1.mlp.down_proj")
    assert set(names) == {name for name in stored if name.startswith("model.layers.1.mlp.down_proj.")}
    found = sum(stored[name].numel() * stored[name].element_size() for name in names)
    assert layout.format.linear_bytes(weight.out_features, weight.in_features, Grid(bits, group)) == found


@pytest.mark.parametrize("name", ["gptq_v2", "compressed-tensors", "auto-round"])
def test_a_caution_that_counts_outputs_names_the_first_that_is_odd(name: str) -> None:
    row = FORMATS[name]
    two, four = Grid(2, 64), Grid(4, 64)
    (said,) = set(row.warnings(two, [128, 576, 192])) - set(row.warnings(two, [128, 256]))
    assert said.endswith(
        "refuses linears whose outputs are no multiple of 128, and this model has some with 576"
    )
    assert row.warnings(four, [576]) == row.warnings(four)
