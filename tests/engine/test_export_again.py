"""What was exported stays until there is something better: with real engines, kills and full disks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import (
    WEIGHTS,
    Child,
    exported,
    failure,
    local_model,
    make_run,
    of,
    output,
    run_here,
    start,
    wait_until,
)
from safetensors.torch import load_file, save_file

from engine.config.derived import resolve
from engine.evaluation.perplexity import perplexity
from engine.export import place
from engine.export.layout import layout_of
from engine.export.reader import packed_model
from engine.pipeline import Pipeline
from engine.plan.plan import make_plan
from engine.reporter import Reporter
from engine.run import control, events
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.run.status import read_status
from engine.run.task import Asked

Engine = Callable[..., Child]
EXPORT = ("--task", "export")
EVAL = ("--task", "eval")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run, which the tests below leave as they found it."""
    run = make_run(tmp_path_factory.mktemp("runs"), {"runtime.activation_store": "disk"})
    assert start(run).code() == 0, output(run)
    return run


def names(run: RunDirectory) -> list[str]:
    return sorted(os.listdir(run.export_dir))


# -- kills ---------------------------------------------------------------------------------------------


def die_before(*events_of_python: tuple[str, str]) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        for name, part in events_of_python:
            if event == name and part in str(arguments):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_writing() -> None:
    die_before(("open", "README.md"))


def die_before_the_exchange() -> None:
    die_before(("ctypes.dlsym", "renameat2"))


def die_after_the_exchange() -> None:
    die_before(("shutil.rmtree", "gptq_v2.partial"))


def die_between_two_renames() -> None:
    place.exchange = lambda one, other, folder: False
    die_before(("os.rename", "'gptq_v2.partial', 'gptq_v2'"))


@pytest.mark.parametrize(
    "die", [die_writing, die_before_the_exchange, die_after_the_exchange, die_between_two_renames]
)
def test_a_killed_export_leaves_a_whole_verified_one_and_the_next_gives_the_same_bytes(
    done: RunDirectory, engine: Engine, die: Callable[[], None]
) -> None:
    before = exported(done)
    # A mark that tells the old export from the new one.
    (done.export_dir / "gptq_v2" / "mark").write_text("old")
    assert engine(done, arguments=EXPORT, before=die).code() == -signal.SIGKILL, output(done)
    if die is die_between_two_renames:
        assert "gptq_v2" not in names(done)
        # Any task at all mends it.
        assert run_here(done, *EVAL) == 0
    found = exported(done)
    assert ("mark" in found) == (die is not die_after_the_exchange)
    assert {name: digest for name, digest in found.items() if name != "mark"} == before
    assert run_here(done, *EXPORT) == 0
    assert exported(done) == before
    assert names(done) == ["gptq_v2"]


def test_an_export_that_is_not_what_was_trained_leaves_the_old_one(
    done: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit flips on the disk between writing and reading."""
    from engine.export import layout

    before, told = exported(done), len(of(done, events.Export))
    real = layout.packed_model

    def flipped(folder: Path, *arguments: Any, **options: Any) -> Any:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return real(folder, *arguments, **options)

    monkeypatch.setattr(layout, "packed_model", flipped)
    assert run_here(done, *EXPORT) == 1
    assert "differs from the trained model" in of(done, events.Error)[-1].message
    assert exported(done) == before
    assert names(done) == ["gptq_v2", "gptq_v2.failed"]
    assert len(of(done, events.Export)) == told
    monkeypatch.undo()
    shutil.rmtree(done.export_dir / "gptq_v2.failed")
    assert run_here(done, *EXPORT) == 0
    assert exported(done) == before


def test_a_run_whose_verification_fails_keeps_what_it_wrote_and_is_exported_without_training(
    tmp_path: Path, done: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All training is done when it happens: nothing of it is lost, and what differs is said."""
    from engine.export import gptq_v2

    real = gptq_v2.GPTQv2.tensors

    def wrong(self: Any, prefix: str, weight: Any) -> Iterator[Any]:
        for name, tensor in real(self, prefix, weight):
            if name.endswith("layers.2.mlp.up_proj.scales"):
                tensor[0, 3] *= 2
            yield name, tensor

    monkeypatch.setattr(gptq_v2.GPTQv2, "tensors", wrong)
    run = make_run(tmp_path / "runs", {"runtime.activation_store": "disk"})
    assert run_here(run) == 1
    error = of(run, events.Error)[-1]
    assert "model.layers.2.mlp.up_proj: 1 scales differ, by up to " in error.message
    assert str(run.export_dir / "gptq_v2.failed") in error.hint
    assert names(run) == ["gptq_v2.failed"]
    assert (run.export_dir / "gptq_v2.failed" / "model.safetensors").is_file()
    monkeypatch.undo()
    assert run_here(run, *EXPORT) == 0
    assert exported(run) == exported(done)
    assert of(run, events.BlockFinished, attempt=2) == [], "nothing is trained again"


# -- the type it is stored in ------------------------------------------------------------------------


def float16_model(folder: Path, name: str, value: float) -> Path:
    """One that declares float16, with a tensor that is full of one value and stored as float32."""
    local_model(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].fill_(value)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    return folder


def test_a_value_that_the_export_cannot_hold_ends_a_run_before_it_trains_and_may_be_widened(
    tmp_path: Path,
) -> None:
    norm = "model.layers.3.post_attention_layernorm.weight"
    model = float16_model(tmp_path / "model", norm, 7e4)
    run = make_run(tmp_path / "runs", {"model.source": str(model), "e2e_qp.enabled": False})
    assert run_here(run) == 3
    error = failure(run, 3)
    assert (error.where, error.hint) == (norm, "--set export.dtype=bfloat16")
    assert "7e+04" in error.message
    assert not of(run, events.BlockStarted)
    assert run_here(run, "--set", "export.dtype=bfloat16") == 0
    assert json.loads((run.export_dir / "gptq_v2" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_figure_in_report_and_card_is_that_of_the_files_alone(done: RunDirectory) -> None:
    """What is not quantized is rounded on its way into them, and measured so."""
    config = resolve(done.config())
    report = Reporter(done, 9, torch.device("cpu"))
    try:
        plan = make_plan(config, device="cpu")
        pipeline = Pipeline(done, config, plan, report, torch.device("cpu"), Asked(task="export"))
        pipeline.prepare()
        tokens = pipeline.job.tokens.evaluation
    finally:
        report.close()
    folder = done.export_dir / "gptq_v2"
    alone = packed_model(folder, layout_of("gptq_v2").reader, torch.device("cpu"), torch.float32)
    measured = perplexity(alone, alone.load_block, tokens, batch_size=2).perplexity
    told = [e.perplexity for e in of(done, events.Eval) if e.stage == "e2e_qp"][-1]
    assert measured == pytest.approx(told, rel=1e-6)
    assert f"{measured:,.3f}" in (folder / "README.md").read_text()


def test_a_finished_run_is_exported_in_another_type_and_back(done: RunDirectory) -> None:
    before = exported(done)
    assert run_here(done, *EXPORT, "--set", "export.dtype=float32") == 0
    config = json.loads((done.export_dir / "gptq_v2" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert run_here(done, *EXPORT) == 0
    assert exported(done) == before


# -- full disks ----------------------------------------------------------------------------------------


@pytest.fixture
def mount() -> Iterator[Callable[[Path, str], None]]:
    """``mount(folder, "64k")``: a file system of that size; called again it changes the size."""
    mounted: list[Path] = []

    def size(folder: Path, bytes_: str) -> None:
        options = f"remount,size={bytes_}" if folder in mounted else f"size={bytes_}"
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a file system of its own can only be mounted by root")
        if folder not in mounted:
            mounted.append(folder)

    yield size
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def waiting(run: RunDirectory) -> str:
    status = read_status(run)
    return status.waiting if status is not None else ""


def test_a_disk_that_fills_during_an_export_is_waited_for_and_the_old_export_stays(
    tmp_path: Path, engine: Engine, mount: Callable[[Path, str], None]
) -> None:
    run = make_run(tmp_path / "runs")
    mount(run.export_dir, "320k")
    assert run_here(run) == 0
    before = exported(run)
    child = engine(run, arguments=EXPORT)
    child.until(lambda: waiting(run))
    assert "the disk is full: an export of" in waiting(run)
    assert str(run.export_dir) in waiting(run)
    assert names(run) == ["gptq_v2"], "half an export takes the room that others wait for"
    assert exported(run) == before
    mount(run.export_dir, "4m")
    assert child.code() == 0, output(run)
    assert exported(run) == before
    assert names(run) == ["gptq_v2"]
    assert [e.code for e in of(run, events.Warning, 2)].count("disk_full") == 1


def test_an_export_that_begins_on_a_full_disk_waits_too(
    tmp_path: Path, engine: Engine, mount: Callable[[Path, str], None]
) -> None:
    """All of the run lies on the small disk, its log and its status too."""
    runs = tmp_path / "small" / "runs"
    runs.mkdir(parents=True)
    mount(runs.parent, "8m")
    run = make_run(runs)
    assert run_here(run) == 0
    before = exported(run)
    fill(runs.parent / "filler")
    child = engine(run, arguments=EXPORT)
    child.until(lambda: waiting(run))
    assert exported(run) == before
    (runs.parent / "filler").unlink()
    assert child.code() == 0, output(run)
    assert exported(run) == before
    assert run_state(run) == "done"


def test_a_run_that_is_stopped_on_a_full_disk_is_stopped_and_not_crashed(
    tmp_path: Path, engine: Engine, mount: Callable[[Path, str], None]
) -> None:
    """Whether its log has room for its last words is decided by the system: the status always has."""
    runs = tmp_path / "small" / "runs"
    runs.mkdir(parents=True)
    mount(runs.parent, "8m")
    run = make_run(
        runs, {"block_ap.sequences": 16, "block_ap.epochs": 200, "runtime.checkpoint_minutes": 1e-4}
    )
    child = engine(run)
    child.until(lambda: of(run, events.CheckpointCommitted))
    child.until(lambda: fill(runs.parent / "filler") or waiting(run))
    child.send(signal.SIGTERM)
    assert child.code() == 75
    assert run_state(run) == "stopped"
    status = read_status(run)
    assert status is not None
    assert (status.outcome, status.exit_code) == ("stopped", 75)


def fill(path: Path) -> None:
    """Take all the room that there is at the moment."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        while file.write(b"x"):
            pass


def test_an_export_that_waits_for_room_can_be_stopped(
    tmp_path: Path, engine: Engine, mount: Callable[[Path, str], None]
) -> None:
    run = make_run(tmp_path / "runs")
    mount(run.export_dir, "64k")
    child = engine(run)
    child.until(lambda: waiting(run))
    control.request(run, "stop")
    assert child.code() == 75
    assert names(run) == []
    assert not of(run, events.Export)
    mount(run.export_dir, "4m")
    assert run_here(run) == 0
    assert of(run, events.Export)[0].verified


def small_memory() -> None:
    from engine.evaluation import rows

    rows.CPU_MEMORY = 0


@pytest.mark.parametrize("what", ["perplexity", "tasks"])
def test_a_disk_that_is_full_for_an_evaluation_is_waited_for(
    tmp_path: Path, engine: Engine, mount: Callable[[Path, str], None], what: str
) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = [
        {"query": f"{n} and", "choices": [" one", " two, which is more"], "gold": n % 2} for n in range(9)
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = "disk" if what == "perplexity" else "host"
    asked = [] if what == "perplexity" else [str(questions)]
    run = make_run(tmp_path / "runs", {"runtime.activation_store": store, "evaluation.tasks": asked})
    assert run_here(run) == 0, output(run)
    before = of(run, events.Eval)[-1]
    run.cache_dir.mkdir(exist_ok=True)
    mount(run.cache_dir, "4k")
    child = engine(run, arguments=EVAL, before=small_memory)
    child.until(lambda: waiting(run))
    assert "the disk is full: the file of an evaluation's activations of" in waiting(run)
    mount(run.cache_dir, "4m")
    assert child.code() == 0, output(run)
    after = of(run, events.Eval)[-1]
    assert after.attempt == 2
    assert (after.perplexity, after.accuracy) == (before.perplexity, before.accuracy)


def test_a_block_training_waits_for_room_for_its_activations(
    tmp_path: Path, engine: Engine, mount: Callable[[Path, str], None]
) -> None:
    run = make_run(tmp_path / "runs", {"runtime.activation_store": "disk", "evaluation.enabled": False})
    mount(run.cache_dir, "4k")
    child = engine(run)
    child.until(lambda: waiting(run))
    assert "the disk is full: the file of activations of" in waiting(run)
    mount(run.cache_dir, "4m")
    assert child.code() == 0, output(run)


def no_large_files(limit: int) -> None:
    """As with ``ulimit -f``: no file may grow beyond this, and that will not change while it waits."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_an_export_beyond_the_limit_of_a_file_ends_with_7_and_leaves_the_old_one(
    done: RunDirectory, engine: Engine
) -> None:
    before = exported(done)
    # The log of a run that was exported often is not small either, and the failure has to fit into it.
    limit = done.events_path.stat().st_size + 50_000
    assert (done.export_dir / "gptq_v2" / WEIGHTS).stat().st_size > limit
    assert engine(done, arguments=EXPORT, before=partial(no_large_files, limit)).code() == 7, output(done)
    assert "disk is full" in of(done, events.Error)[-1].message
    assert (exported(done), names(done)) == (before, ["gptq_v2"])


# -- copies --------------------------------------------------------------------------------------------


def test_a_copy_for_which_a_disk_has_no_room_ends_with_7_and_leaves_nothing_there(
    done: RunDirectory, tmp_path: Path, mount: Callable[[Path, str], None]
) -> None:
    before, told = exported(done), len(of(done, events.Export))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "100k")
    assert run_here(done, *EXPORT, "--to", str(disk / "copy")) == 7
    assert os.listdir(disk) == []
    assert exported(done) == before
    assert len(of(done, events.Export)) == told, "the export in the run is there, told and not made again"
    mount(disk, "4m")
    assert run_here(done, *EXPORT, "--to", str(disk / "copy")) == 0
    assert sorted(os.listdir(disk / "copy")) == sorted(before)
    assert of(done, events.Export)[-1].copied_to == str(disk / "copy")


# -- what a model brings along -------------------------------------------------------------------------


def test_names_of_code_that_does_not_come_along_are_left_out_and_told(tmp_path: Path, engine: Engine) -> None:
    model = local_model(tmp_path / "model")
    content = json.loads((model / "config.json").read_text())
    content["auto_map"] = {"AutoModelForSequenceClassification": "other/repo--theirs.Model"}
    (model / "config.json").write_text(json.dumps(content))
    settings = {"model.source": str(model), "e2e_qp.enabled": False}
    for trusted in (False, True):
        run = make_run(tmp_path / "runs", {**settings, "model.trust_remote_code": trusted})
        assert run_here(run) == 0, output(run)
        assert "auto_map" not in (run.export_dir / "gptq_v2" / "config.json").read_text()
        told = [e.message for e in of(run, events.Warning) if e.code == "auto_map"]
        assert [("other/repo--theirs.Model" in message) for message in told] == [True] * trusted


# -- links ---------------------------------------------------------------------------------------------


def test_a_run_whose_export_folder_is_a_link_is_refused_in_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    (tmp_path / "elsewhere").mkdir()
    run.export_dir.rmdir()
    run.export_dir.symlink_to(tmp_path / "elsewhere")
    assert run_here(run) == 3
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_run_that_is_deleted_while_it_exports_does_not_come_back(tmp_path: Path, engine: Engine) -> None:
    run = make_run(tmp_path / "runs", {"evaluation.enabled": False})
    child = engine(run, before=stop_at_the_assets)
    wait_until(lambda: (run.path / "here").exists())
    log = run.logs_dir.rename(tmp_path / "logs")
    subprocess.run(["rm", "-rf", str(run.path)], check=True)
    child.send(signal.SIGCONT)
    assert child.code() == 3
    assert not run.path.exists()
    assert "Traceback" not in "".join(path.read_text() for path in log.iterdir())


def stop_at_the_assets() -> None:
    """Stand still when the tensors are written, and say so."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith("gptq_v2.partial/model.safetensors"):
            (Path(str(arguments[1])).parents[2] / "here").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(hook)
