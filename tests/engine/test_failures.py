"""Bad input and bad luck: the documented exit code, one clear line, no traceback, and nothing lost."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_runs import WEIGHTS, Child, change, exported, failure, local_model, make_run, of, output, run_here
from safetensors.torch import load_file, save_file

from engine.errors import EqatError, ExitCode
from engine.failures import as_eqat_error
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]


def failed(run: RunDirectory, engine: Engine, code: int) -> events.Error:
    """A real engine process ends with ``code`` and says why."""
    assert engine(run).code() == code, output(run)
    assert run_state(run) == "failed"
    return failure(run, code)


@pytest.fixture(scope="module")
def made_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_model(tmp_path_factory.mktemp("made"))


@pytest.fixture
def model(made_model: Path, tmp_path: Path) -> Path:
    """A model's folder that the test may spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in made_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# -- configuration and device (2, 3) -------------------------------------------------------------------


def test_a_wrong_setting_is_refused_by_name_before_anything_is_loaded(make: Make, engine: Engine) -> None:
    run = make()
    change(run, **{"grid.bits": 5})
    error = failed(run, engine, 2)
    assert error.where == "grid.bits"
    assert not of(run, events.RunStarted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_what_to_do(make: Make, engine: Engine) -> None:
    error = failed(make(**{"runtime.device": "cuda"}), engine, 3)
    assert error.where == "runtime.device"
    assert "cpu" in error.hint


def test_too_small_a_memory_budget_is_refused_by_the_plan(make: Make, engine: Engine) -> None:
    run = make(**{"runtime.host_memory_gib": 0.01})
    assert "host memory" in failed(run, engine, 3).message
    assert of(run, events.Plan)
    assert not of(run, events.PhaseStarted)


# -- text (4) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["data.source", "data.mix", "evaluation.data.source", "evaluation.texts"])
def test_what_is_wrong_with_a_text_names_the_setting_that_it_came_from(
    make: Make, tmp_path: Path, setting: str
) -> None:
    """A run reads several texts, and one may stand in two settings."""
    table = tmp_path / "rows.jsonl"
    table.write_text('{"n": 1}\n' * 3)
    given = {"data.mix": ["builtin:0.5", f"{table}:0.5"], "evaluation.texts": [str(table)]}
    run = make(**{setting: given.get(setting, str(table))})
    assert run_here(run) == 4
    assert failure(run, 4).where == f"{setting}: {table}:1"


# -- model (3) -----------------------------------------------------------------------------------------


def test_a_missing_model_is_one_clear_line(make: Make, engine: Engine, tmp_path: Path) -> None:
    error = failed(make(**{"model.source": str(tmp_path / "nothing-here")}), engine, 3)
    assert "nothing-here" in error.where + error.message
    assert error.hint


def test_nan_weights_name_the_tensor(make: Make, engine: Engine, model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / WEIGHTS)
    error = failed(make(**{"model.source": str(model)}), engine, 3)
    assert "model.layers.2.mlp.up_proj.weight" in error.where
    assert "NaN" in error.message


SPOILED: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1000),
    "only a header": lambda path: os.truncate(path, 200),
    "empty": lambda path: os.truncate(path, 0),
    "not safetensors": lambda path: path.write_bytes(b"<html>rate limited</html>" * 99),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_weight_files_are_named(make: Make, engine: Engine, model: Path, how: str) -> None:
    SPOILED[how](model / WEIGHTS)
    error = failed(make(**{"model.source": str(model)}), engine, 3)
    assert WEIGHTS in error.where + error.message or str(model) in error.where


def test_a_missing_tensor_is_named(make: Make, engine: Engine, model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, model / WEIGHTS)
    error = failed(make(**{"model.source": str(model)}), engine, 3)
    assert "model.layers.1.self_attn.k_proj.weight" in error.where + error.message


# -- text (4) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        ("empty.txt", "", None, "empty"),
        ("blank.txt", " \n\n ", None, ""),
        ("no-column.jsonl", '{"body": "some words"}\n' * 50, "text", "text"),
        ("broken.jsonl", '{"text": "some words"\n' * 50, None, ""),
        ("missing.txt", None, None, "missing.txt"),
    ],
)
def test_text_that_cannot_be_used_is_exit_code_4(
    make: Make, engine: Engine, tmp_path: Path, name: str, content: str | None, column: str | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    settings = {"data.source": str(path), **({"data.column": column} if column else {})}
    error = failed(make(**settings), engine, 4)
    assert name in error.where + error.message
    assert words in error.where + error.message + error.hint


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(
    make: Make, engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Only a few words.")
    error = failed(make(**{"data.source": str(path)}), engine, 4)
    assert len(re.findall(r"\d+", error.message)) >= 2, error


def test_text_that_disappears_between_attempts_loses_nothing(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    text = "\n\n".join(f"{n} times {m} is {n * m}." for n in range(40) for m in range(40))
    path.write_text(text)
    run = make(**{"data.source": str(path)})
    assert run_here(run) == 0
    before = exported(run)
    path.unlink()
    assert run_here(run) == 4
    path.write_text(text)
    assert run_here(run) == 0
    assert exported(run) == before


# -- numbers (5) ---------------------------------------------------------------------------------------


def test_a_model_that_overflows_ends_with_5_naming_block_and_step(
    make: Make, engine: Engine, model: Path
) -> None:
    """Block 1 puts out numbers whose squares float32 does not hold."""
    tensors = load_file(model / WEIGHTS)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e25
    save_file(tensors, model / WEIGHTS)
    settings = {"block_ap.loss": "mse", "evaluation.enabled": False, "block_ap.epochs": 3}
    run = make(**{"model.source": str(model), **settings})
    error = failed(run, engine, 5)
    assert error.where == "block 1"
    assert "step" in error.message
    assert [e.block for e in of(run, events.BlockFinished)] == [0], "what was finished before is kept"
    assert [e.code for e in of(run, events.Warning)].count("rollback") == 2


@pytest.mark.parametrize("sequences", [2, 4], ids=["one step", "two steps"])
def test_fewer_steps_than_three_cannot_hide_a_divergence(make: Make, model: Path, sequences: int) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e25
    save_file(tensors, model / WEIGHTS)
    settings = {"block_ap.loss": "mse", "evaluation.enabled": False, "block_ap.sequences": sequences}
    run = make(**{"model.source": str(model), **settings})
    assert run_here(run) == 5
    assert failure(run, 5).where == "block 1"


def test_ruinous_learning_rates_end_with_5_and_commit_no_block(make: Make) -> None:
    """AdamW's steps have the size of the learning rate: the last one overflows, and none after it tells."""
    run = make(**{"block_ap.lr_weight": 1e38, "block_ap.lr_quant": 1e38, "block_ap.val_sequences": 0})
    assert run_here(run) == 5
    assert failure(run, 5).where == "block 0"
    assert not of(run, events.BlockFinished)


def test_ruinous_end_to_end_learning_ends_with_5_and_keeps_the_blocks(make: Make) -> None:
    run = make(
        **{"e2e_qp.lr": 1e38, "e2e_qp.val_sequences": 0, "e2e_qp.epochs": 4, "e2e_qp.warmup_fraction": 0}
    )
    assert run_here(run) == 5
    assert failure(run, 5).where == "e2e_qp"
    assert len(of(run, events.BlockFinished)) == 4
    change(run, **{"e2e_qp.lr": 1e-3})
    assert run_here(run) == 8, "another learning rate is another run"


# -- disk (3, 7) ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and _mount(place, "size=64m,nr_inodes=4096")
    if not mounted:
        pytest.skip("a file system of its own can only be mounted by root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def _mount(place: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_disk_that_is_full_at_the_very_first_file_is_said_with_its_code(
    small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has bytes, so that the plan is content, and no place for another file."""
    run = make_run(small_disk / "runs")
    fillers = small_disk / "fillers"
    fillers.mkdir()
    with contextlib.suppress(OSError):
        for number in range(10_000):
            (fillers / str(number)).touch()
    assert run_here(run) == 7
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "the disk is full" in said[0]
    with pytest.raises(EqatError) as caught:
        RunDirectory.create(small_disk / "runs", run.config())
    assert caught.value.exit_code == 7
    assert [path.name for path in (small_disk / "runs").iterdir()] == [run.id]
    shutil.rmtree(fillers)
    assert run_here(run) == 0


def test_a_file_size_limit_is_a_full_disk_too(make: Make, engine: Engine) -> None:
    """Needs no root: no file may grow beyond the size of a block."""
    run = make(**{"grid.bits": 8, "evaluation.enabled": False})
    assert engine(run, largest_file=30_000).code() == 7
    assert "disk is full" in failure(run, 7).message
    assert not list(run.checkpoints_dir.glob("objects/*")), "nothing half written is left"
    assert run_here(run) == 0
    assert of(run, events.Export)[0].verified


def test_a_run_directory_that_cannot_be_written_is_refused(make: Make, engine: Engine) -> None:
    run = make()
    run.lock_path.mkdir()  # permissions do not stop root; a folder in the way stops everyone
    assert engine(run).code() == 3
    said = output(run).strip().splitlines()
    assert len(said) == 1
    assert "is a folder, not a regular file" in said[0]


def test_a_folder_that_cannot_be_written_is_refused_after_the_start_too(make: Make, engine: Engine) -> None:
    run = make()
    run.checkpoints_dir.rmdir()
    run.checkpoints_dir.write_text("in the way")
    error = failed(run, engine, 3)
    assert "checkpoints" in error.where
    assert "where a run has a folder" in error.message


def test_a_read_only_file_system_is_refused(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(small_disk / "runs")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert run_here(run) == 3
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "Read-only file system" in said[0]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert run_here(run) == 0


# -- from any exception to a line ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 7),
        (OSError(errno.EDQUOT, "Quota exceeded"), 7),
        (OSError(errno.EFBIG, "File too large", "a.safetensors"), 7),
        (Exception("No space left on device (os error 28)"), 7),
        (MemoryError(), 6),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 6),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 6),
        (PermissionError(errno.EACCES, "Permission denied", "/somewhere"), 3),
        (ZeroDivisionError("division by zero"), 1),
        (RuntimeError("two\nlines"), 1),
        (RuntimeError(), 1),
    ],
)
def test_every_exception_has_an_exit_code_and_one_line(error: Exception, code: int) -> None:
    if isinstance(error, torch.cuda.OutOfMemoryError) and not torch.cuda.is_available():
        pytest.skip("asks the GPU how much is free")
    found = as_eqat_error(error, "block_ap, block 3")
    assert found.exit_code == ExitCode(code)
    assert found.where == "block_ap, block 3"
    assert "\n" not in str(found)
