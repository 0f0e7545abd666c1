"""Runs that are made of a quantized checkpoint: what is done with them is what is done with any run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_runs import Child, exported, failure, of, output, run_here
from safetensors.torch import load_file, save_file

from engine.checkpoints.store import CheckpointStore
from engine.config.grid import Grid
from engine.errors import UsageError
from engine.export.importing import look_at
from engine.export.layout import layout_of
from engine.plan.plan import make_plan
from engine.quant.packed import PackedBlock
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.redo import make_redo
from engine.run.usable import newest_usable

FORMATS = {3: ("gptq_v2", "compressed-tensors", "auto-round", "mlx"), 4: ("awq",)}
CELLS = [(bits, name) for bits, names in FORMATS.items() for name in names]
ORIGINAL = "random://tiny-llama"
Make = Callable[..., RunDirectory]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(finished_once: Make) -> Callable[..., Path]:
    """An export of a small run, in a folder of its own."""

    def of_format(bits: int = 3, name: str = "gptq_v2") -> Path:
        run = finished_once(**{"grid.bits": bits, "export.formats": list(FORMATS[bits])})
        return run.export_dir / name

    return of_format


def settings(path: Path, bits: int = 3, **more: object) -> dict[str, object]:
    return {
        "model.source": str(path),
        "imported.enabled": True,
        "grid.bits": bits,
        "block_ap.enabled": False,
        "e2e_qp.enabled": False,
        **more,
    }


def measured(run: RunDirectory) -> dict[str, float | None]:
    return {found.stage: found.perplexity for found in of(run, events.Eval)}


@pytest.mark.parametrize(("bits", "name"), CELLS)
def test_an_export_that_is_imported_is_measured_the_same_and_exported_to_the_same_bytes(
    make: Make, checkpoint: Callable[..., Path], bits: int, name: str
) -> None:
    path = checkpoint(bits, name)
    run = make(**settings(path, bits, **{"export.formats": [name]}))
    assert run_here(run) == 0, output(run)
    before = RunDirectory.open(path.parents[1])
    # The one was read beside full precision, the other alone: the sums have other last bits.
    assert measured(run) == {"imported": pytest.approx(measured(before)["e2e_qp"], rel=1e-9)}
    again, first = exported(run, name), exported(before, name)
    assert again.keys() == first.keys()
    assert {file for file in again if again[file] != first[file]} == {"README.md"}
    assert "quantized by others and imported with eqat" in (run.export_dir / name / "README.md").read_text()
    found, reader = newest_usable(run.checkpoints_dir), layout_of(name).reader(path)
    assert found is not None
    store = CheckpointStore(run.checkpoints_dir, found.generation.identity)
    for index in range(4):
        block = PackedBlock.from_tensors(store.get(f"block-{index:03d}"), Grid(bits, 32))
        for linear, weight in block.linears.items():
            parts = reader.linear(f"model.layers.{index}.{linear}").parts()
            assert torch.equal(weight.codes(), parts["integers"])
            zeros = parts["zero points"] if "zero points" in parts else -parts["biases"] / parts["scales"]
            assert torch.equal(weight.zero_point.to(zeros.dtype), zeros)
            assert torch.equal(weight.scale, parts["scales"])


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("mlx", {"grid.bits": 3, "grid.head_bits": 8}),
        ("gptq_v2", {"grid.bits": 4, "grid.symmetric": True, "grid.group_size": -1}),
    ],
)
def test_a_quantized_head_and_whole_rows_come_back_as_the_same_bytes(
    make: Make, finished_once: Make, name: str, grid: dict[str, object]
) -> None:
    before = finished_once(**grid, **{"export.formats": [name]})
    path = before.export_dir / name
    found = look_at(path)
    assert (found.head_bits, found.group_size) == (
        grid.get("grid.head_bits", 0),
        grid.get("grid.group_size", 32),
    )
    run = make(**settings(path, **grid, **{"export.formats": [name]}))
    assert run_here(run) == 0, output(run)
    assert measured(run) == {"imported": pytest.approx(measured(before)["e2e_qp"], rel=1e-9)}
    again, first = exported(run, name), exported(before, name)
    assert {file for file in again.keys() | first.keys() if again.get(file) != first.get(file)} == {
        "README.md"
    }


def test_end_to_end_training_goes_on_from_an_import_and_makes_its_loss_smaller(
    make: Make, checkpoint: Callable[..., Path]
) -> None:
    more = {"e2e_qp.enabled": True, "e2e_qp.loss": "cross_entropy", "e2e_qp.epochs": 8, "e2e_qp.lr": 0.02}
    run = make(**settings(checkpoint(), **more, **{"e2e_qp.sequences": 16}))
    assert run_here(run) == 0, output(run)
    losses = [event.loss for event in of(run, events.Metric) if event.phase == "e2e_qp"]
    assert losses[-1] < losses[0]
    perplexities = measured(run)
    assert list(perplexities) == ["imported", "e2e_qp"]
    assert perplexities["e2e_qp"] < perplexities["imported"]  # type: ignore[operator]
    assert of(run, events.Export)[-1].verified


def test_scales_below_zero_are_trained_and_stay_below_it(
    make: Make, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    place = shutil.copytree(checkpoint(), tmp_path / "theirs")
    tensors = load_file(place / WEIGHTS)
    for name in [name for name in tensors if name.endswith(".scales")]:
        # The same weights: (q - z) s = ((Q - q) - (Q - z)) (-s).
        linear = name.removesuffix(".scales")
        tensors[name] = -tensors[name]
        for part in ("qweight", "qzeros"):
            tensors[f"{linear}.{part}"] = ~tensors[f"{linear}.{part}"]
    save_file(tensors, place / WEIGHTS, {"format": "pt"})
    more = {"e2e_qp.enabled": True, "e2e_qp.loss": "cross_entropy", "e2e_qp.epochs": 4}
    turned, plain = (make(**settings(path, **more)) for path in (place, checkpoint()))
    assert (run_here(turned), run_here(plain)) == (0, 0), output(turned)
    assert measured(turned) == pytest.approx(measured(plain), rel=1e-4)
    assert measured(turned)["e2e_qp"] != measured(turned)["imported"]
    scales = [t for name, t in load_file(turned.export_dir / "gptq_v2" / WEIGHTS).items() if "scales" in name]
    assert all(bool((tensor < 0).all()) for tensor in scales)


def test_with_its_original_a_run_is_compared_and_taught_as_any_other(
    make: Make, checkpoint: Callable[..., Path], finished_once: Make
) -> None:
    more: dict[str, object] = {"imported.reference": ORIGINAL, "e2e_qp.enabled": True, "export.formats": []}
    run = make(**settings(checkpoint(), **more))
    assert run_here(run) == 0, output(run)
    found = measured(run)
    before = measured(finished_once(**{"grid.bits": 3, "export.formats": list(FORMATS[3])}))
    assert list(found) == ["fp", "rtn", "imported", "e2e_qp"]
    assert found["fp"] == before["fp"]
    assert found["rtn"] == pytest.approx(before["rtn"], rel=0.01)
    assert run_here(run, "--task", "generate", "--prompt", "a b c", "--new-tokens", "3") == 0, output(run)
    assert [sample.stage for sample in of(run, events.Sample)] == ["fp", "e2e_qp"]


def test_without_its_original_a_sample_is_the_quantized_models_alone(
    make: Make, checkpoint: Callable[..., Path]
) -> None:
    run = make(**settings(checkpoint(), **{"export.formats": []}))
    assert run_here(run) == 0, output(run)
    assert run_here(run, "--task", "generate", "--prompt", "a b c", "--new-tokens", "3") == 0, output(run)
    assert [sample.stage for sample in of(run, events.Sample)] == ["imported"]
    assert run_here(run, "--task", "export", "--format", "hf") == 0, output(run)
    config = json.loads((run.export_dir / "hf" / "config.json").read_text())
    assert "quantization_config" not in config


def test_learning_from_an_original_that_is_not_known_is_refused_before_anything_is_made(
    make: Make, checkpoint: Callable[..., Path]
) -> None:
    run = make(**settings(checkpoint(), **{"e2e_qp.enabled": True, "e2e_qp.loss": "kl"}))
    with pytest.raises(UsageError, match="E2E-QP would learn from the original model") as caught:
        make_plan(run.config())
    assert caught.value.where == "e2e_qp.loss"
    assert run_here(run) == 2
    assert failure(run, 2).hint


def test_a_run_on_another_grid_than_the_checkpoints_names_the_linear(
    make: Make, checkpoint: Callable[..., Path]
) -> None:
    run = make(**settings(checkpoint(), 4))
    assert run_here(run) == 3
    assert "is w3g32, which is not the run's grid" in failure(run, 3).message


def test_an_import_that_is_killed_goes_on_and_comes_out_the_same(
    make: Make, checkpoint: Callable[..., Path], engine: Callable[..., Child]
) -> None:
    more = {"e2e_qp.enabled": True, "e2e_qp.loss": "cross_entropy"}
    whole, cut = (make(**settings(checkpoint(), **more)) for _ in range(2))
    assert run_here(whole) == 0, output(whole)
    for point in (5, 9, 14):  # inside the import, behind it, in the training
        assert engine(cut, die_at=point).code() == -9, output(cut)
    assert engine(cut).code() == 0, output(cut)
    assert of(cut, events.BlockFinished)
    assert {**exported(cut), "README.md": ""} == {**exported(whole), "README.md": ""}
    assert measured(cut) == measured(whole)


def test_an_imported_run_is_trained_on_later_in_a_run_that_shares_its_blocks(
    make: Make, checkpoint: Callable[..., Path]
) -> None:
    run = make(**settings(checkpoint(), **{"export.formats": []}))
    assert run_here(run) == 0, output(run)
    more = {"e2e_qp.enabled": "true", "imported.reference": ORIGINAL}
    later = make_redo(run, 4, more)
    assert run_here(later) == 0, output(later)
    assert [event.restored for event in of(later, events.BlockFinished) if event.phase == "imported"] == [
        True
    ] * 4
    assert measured(later)["imported"] == measured(run)["imported"]
    assert measured(later)["e2e_qp"] != measured(later)["imported"]
    assert measured(later)["fp"] is not None


def test_another_checkpoint_under_the_same_run_is_refused(
    make: Make, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    place = shutil.copytree(checkpoint(), tmp_path / "theirs")
    run = make(**settings(place, **{"export.formats": []}))
    assert run_here(run) == 0, output(run)
    config = json.loads((place / "config.json").read_text())
    # The same bytes, told to be of another version: other zero points.
    config["quantization_config"]["checkpoint_format"] = config["quantization_config"]["format"] = "gptq"
    (place / "config.json").write_text(json.dumps(config))
    assert run_here(run, "--task", "eval") == 8
    assert "model" in of(run, events.Error)[-1].where


# -- the command ---------------------------------------------------------------------------------------


def eqat(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eqat_tui", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "EQAT_RUNS_DIR": str(folder), "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )


def test_the_command_makes_a_run_that_is_listed(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint(4, "awq")
    small = ["--preset", "smoke", "--device", "cpu", "--set", "evaluation.windows=2"]
    made = eqat(tmp_path, "import", str(path), *small, "--set", "export.formats=awq", "--json")
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert told["state"] == "done"
    assert told["perplexity"]["imported"] > 1
    assert "its original is not known here" in made.stderr
    (row,) = json.loads(eqat(tmp_path, "runs", "--json").stdout)
    assert (row["bits"], row["group_size"], row["exports"]) == (4, 32, ["awq"])
    assert row["perplexity"]["fp"] is None


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (("--set", "grid.bits=2"), "grid.bits: is what the checkpoint has", 2),
        (("--set", "no.such=1"), "no.such: there is no such field", 2),
        (("--reference", "random://tiny-llama", "--set", "block_ap.enabled=true"), "only one can", 2),
    ],
)
def test_what_the_command_refuses_leaves_nothing_behind(
    checkpoint: Callable[..., Path], tmp_path: Path, arguments: tuple[str, ...], words: str, code: int
) -> None:
    runs = tmp_path / "runs"
    refused = eqat(runs, "import", str(checkpoint()), "--preset", "smoke", *arguments)
    assert refused.returncode == code, refused.stderr
    assert words in refused.stderr
    assert len([line for line in refused.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert not runs.exists()


def test_a_checkpoint_that_cannot_be_imported_leaves_nothing_behind(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    place = shutil.copytree(checkpoint(), tmp_path / "theirs")
    os.truncate(place / WEIGHTS, (place / WEIGHTS).stat().st_size - 10)
    refused = eqat(tmp_path / "runs", "import", str(place))
    assert refused.returncode == 3
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
