"""A run writes, verifies and recovers formats that another package has added to the table."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from engine_runs import exported, failure, local_model, of, run_here
from safetensors import safe_open
from toy_format import ROW

from engine.checkpoints.store import CheckpointStore
from engine.config.formats import FORMATS
from engine.config.stages import STAGES
from engine.errors import EqatError, UsageError
from engine.export.gguf_reader import GGUFContent
from engine.export.judging import judge
from engine.export.place import ExportPlace
from engine.phases.export import recover_exports
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.facts import block_entry, stage_entry
from engine.run.state import load_state
from engine.run.usable import newest_usable
from eqat_tui.commands.looking import verify as verify_command
from eqat_tui.judging import changed_files, checkpoints_of


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    FORMATS.register(ROW)
    yield
    FORMATS.unregister(ROW.name)


def test_a_run_writes_every_format_that_its_configuration_names(make: Callable[..., RunDirectory]) -> None:
    run = make(**{"export.formats": ["gptq_v2", "toy"], "grid.bits": 4})
    place = ExportPlace(run.export_dir / "toy", run.path)
    place.partial.mkdir(parents=True)
    assert run_here(run) == 0
    told = of(run, events.Export)
    assert [(event.format, event.path, event.verified) for event in told] == [
        ("gptq_v2", "export/gptq_v2", True),
        ("toy", "export/toy", True),
    ]
    assert "toy.json" in exported(run, "toy")
    assert "quantize_config.json" in exported(run, "gptq_v2")
    assert run_here(run, "--task", "export", "--format", "toy") == 0
    assert [event.format for event in of(run, events.Export)][2:] == ["toy"]
    place.partial.mkdir()
    recover_exports(run)
    assert not place.partial.exists()


def test_a_run_of_an_earlier_version_whose_entries_have_no_grids_exports_the_same(
    finished_copy: Callable[..., RunDirectory],
) -> None:
    run = finished_copy()
    before = exported(run)
    found = newest_usable(run.checkpoints_dir, lambda generation: None)
    assert found is not None
    store = CheckpointStore(run.checkpoints_dir, found.generation.identity)
    blocks = [name for name in found.generation.entries if name.startswith("block-")]
    assert blocks == [block_entry(index) for index in range(len(blocks))]
    for name in blocks:
        tensors = store.get(name)
        earlier = {key: value for key, value in tensors.items() if not key.endswith(".grid")}
        assert len(earlier) < len(tensors)
        store.put(name, earlier)
    store.commit()
    shutil.rmtree(run.export_dir / "gptq_v2")
    assert run_here(run, "--task", "export") == 0
    assert exported(run) == before


def test_a_run_writes_a_gguf_file_and_another_one_is_written_after_the_fact(
    make: Callable[..., RunDirectory],
) -> None:
    run = make(**{"export.formats": ["gguf"], "grid.bits": 4})
    assert run_here(run) == 0
    (told,) = of(run, events.Export)
    assert (told.format, told.path, told.verified) == ("gguf", "export/gguf", True)
    (name,) = (name for name in told.files if name != "README.md")
    assert name == "tiny-llama-Q4_1.gguf"
    assert told.bits_per_weight == 5.0
    assert "bias in float16" in told.rounded
    assert told.rounded[1:] in (run.export_dir / "gguf" / "README.md").read_text()
    plan = of(run, events.Plan)[0].plan
    content = GGUFContent(run.export_dir / "gguf" / name)
    assert plan["export_bytes"] == sum(place.nbytes for place in content.tensors.values())
    before = told.files
    shutil.rmtree(run.export_dir / "gguf")
    assert run_here(run, "--task", "export", "--format", "gguf") == 0
    assert of(run, events.Export)[-1].files == before


def test_verify_takes_the_name_of_a_run_and_looks_at_each_of_its_exports(
    finished_copy: Callable[..., RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_copy()
    shutil.copytree(run.export_dir / "gptq_v2", run.export_dir / "compressed-tensors")
    place = run.path.parent
    wanted = [run.export_dir / "gptq_v2", run.export_dir / "compressed-tensors"]
    assert checkpoints_of(run.id, place) == checkpoints_of(str(run.path), None) == wanted
    assert checkpoints_of(str(wanted[0]), None) == wanted[:1]
    shutil.rmtree(wanted[1])
    assert verify_command(run.id, runs_dir=place, as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["sound"], said["as_written"]) == (str(wanted[0]), True, True)
    shutil.rmtree(run.export_dir)
    with pytest.raises(UsageError, match="it has no export yet"):
        checkpoints_of(run.id, place)


@pytest.fixture
def judged_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are looked at in this process: another one takes seconds to start."""

    def here(module: str, answer: str, path: Path, *_: object) -> dict[str, object]:
        found = judge(path)
        return {**msgspec.to_builtins(found), answer: found.sound}

    monkeypatch.setattr("eqat_tui.judging.said_by", here)


@pytest.mark.usefixtures("judged_here")
def test_an_export_that_cannot_be_read_keeps_nobody_from_looking_at_the_others(
    finished_copy: Callable[..., RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_copy()
    cut, whole = run.export_dir / "gptq_v2", run.export_dir / "compressed-tensors"
    shutil.copytree(cut, whole)
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert verify_command(str(run.path), as_json=True) == 4
    first, second = json.loads(capsys.readouterr().out)
    assert (first["path"], first["sound"], first["as_written"]) == (str(cut), False, False)
    assert "it ends inside tensor" in first["problems"][0]
    assert first["problems"][1:] == ["model.safetensors: is not what was verified"]
    assert (second["path"], second["sound"]) == (str(whole), True)
    assert first.keys() == second.keys()
    assert verify_command(str(run.path)) == 4
    told = capsys.readouterr().out
    assert "GPTQ v2, no model can be made of it" in told
    assert "  sound: every tensor is there" in told
    with pytest.raises(EqatError, match="it ends inside tensor") as refused:
        verify_command(str(cut))
    assert refused.value.exit_code == 4


@pytest.mark.usefixtures("judged_here")
def test_an_integer_of_an_export_that_is_another_one_is_told(
    finished_copy: Callable[..., RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_copy()
    folder = run.export_dir / "gptq_v2"
    with (folder / "README.md").open("a") as card:
        card.write("What somebody added.\n")
    assert changed_files(folder) == []
    file = folder / "model.safetensors"
    content = file.read_bytes()
    with safe_open(file, "np") as opened:
        words = next(name for name in opened.keys() if name.endswith("qweight"))  # noqa: SIM118
        place = content.index(opened.get_tensor(words).tobytes())
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    (folder / "tokenizer.json").unlink()
    assert verify_command(str(folder), as_json=True) == 4
    said = json.loads(capsys.readouterr().out)
    assert (said["sound"], said["as_written"]) == (False, False)
    assert said["problems"] == [
        "model.safetensors: is not what was verified",
        "tokenizer.json: is not there any more",
    ]
    # Elsewhere it is as good as any other.
    assert changed_files(shutil.copytree(folder, run.path.parent / "elsewhere")) is None
    run.events_path.unlink()
    assert changed_files(folder) is None


@pytest.mark.skipif(
    bool(FORMATS["onnx"].missing_libraries()), reason="the packages of the extra onnx are not installed"
)
def test_a_run_writes_an_onnx_graph_as_large_as_planned(
    make: Callable[..., RunDirectory],
) -> None:
    run = make(**{"export.formats": ["onnx"], "grid.bits": 2})
    assert run_here(run) == 0
    (told,) = of(run, events.Export)
    assert (told.format, told.path, told.verified, told.rounded) == ("onnx", "export/onnx", True, "")
    assert {"model.onnx", "model.onnx.data", "README.md", "config.json", "tokenizer.json"} <= set(told.files)
    planned = of(run, events.Plan)[0].plan["export_bytes"]
    assert planned <= told.bytes < 1.01 * planned


def test_a_format_whose_packages_are_missing_is_refused_before_anything_is_trained(
    make: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.config.formats.find_spec", lambda name: None)
    run = make(**{"export.formats": ["gptq_v2", "onnx"], "grid.bits": 4})
    assert run_here(run) == 3
    error = failure(run, 3)
    assert error.message == "ONNX needs onnx, onnxscript, onnxruntime, not installed here"
    assert error.hint.startswith("pip install onnx onnxscript onnxruntime, or leave onnx out")
    assert not of(run, events.BlockStarted)


def test_a_tokenizer_that_a_gguf_file_cannot_hold_is_refused_before_anything_is_trained(
    make: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    folder = local_model(tmp_path / "model")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(content))
    run = make(**{"model.source": str(folder), "export.formats": ["gptq_v2", "gguf"]})
    assert run_here(run) == 3
    error = failure(run, 3)
    assert error.message == "a GGUF file cannot hold the tokenizer: it normalizes text (Lowercase)"
    assert "leave gguf out of export.formats" in error.hint
    assert not of(run, events.BlockStarted)


def test_formats_of_different_sizes_are_written_in_one_run_as_large_as_planned(
    make: Callable[..., RunDirectory],
) -> None:
    run = make(**{"export.formats": ["compressed-tensors", "awq", "mlx", "hf"], "grid.bits": 4})
    assert run_here(run) == 0
    told = of(run, events.Export)
    assert [(event.format, event.verified) for event in told] == [
        (name, True) for name in ("compressed-tensors", "awq", "mlx", "hf")
    ]
    sizes = {event.format: event.bytes for event in told}
    assert sizes["awq"] < sizes["mlx"] < sizes["hf"]
    planned = of(run, events.Plan)[0].plan["export_bytes"]
    headers = sum(map(header_bytes, run.export_dir.glob("*/*.safetensors")))
    assert sum(sizes.values()) - headers == planned


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_a_format_that_does_not_hold_what_was_trained_is_told_of_once_the_others_are_written(
    finished_copy: Callable[..., RunDirectory],
) -> None:
    run = finished_copy()
    found = newest_usable(run.checkpoints_dir, lambda generation: None)
    assert found is not None
    store = CheckpointStore(run.checkpoints_dir, found.generation.identity)
    entry = stage_entry(STAGES["e2e_qp"], 1)
    tensors = store.get(entry)
    tensors["mlp.up_proj.zero_point"][3, 0] = 0
    points = [tensor for name, tensor in tensors.items() if name.endswith(".zero_point")]
    store.put(entry, tensors)
    store.commit()
    told = len(of(run, events.Export))
    formats = ("--format", "gptq", "--format", "auto-round")
    assert run_here(run, "--task", "export", *formats) == 3
    assert [(event.format, event.verified) for event in of(run, events.Export)[told:]] == [
        ("auto-round", True)
    ]
    assert sorted(os.listdir(run.export_dir)) == ["auto-round", "gptq_v2"]
    error = of(run, events.Error)[-1]
    zeros = sum(int((tensor == 0).sum()) for tensor in points)
    groups = sum(tensor.numel() for tensor in points)
    assert error.message.startswith(f"{zeros} of {4 * groups} zero points are 0")
    assert error.hint.startswith("choose gptq_v2")
    assert load_state(run).outcome == "done"


def test_what_a_format_cannot_hold_is_refused_before_an_export_after_the_fact(
    finished_copy: Callable[..., RunDirectory],
) -> None:
    run = finished_copy()
    before = exported(run)
    assert run_here(run, "--task", "export", "--format", "awq") == 3
    error = of(run, events.Error)[-1]
    assert error.message == "AWQ cannot hold 3 bits"
    assert error.hint.startswith("compressed-tensors can")
    assert exported(run) == before
