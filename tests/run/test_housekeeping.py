"""Deleting and cleaning: nothing that a run needs goes, and nothing outside of it."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from engine.run import config as configs
from engine.run import events, generations, housekeeping, launch
from engine.run.directory import RunDirectory, list_runs
from engine.run.errors import PreflightError
from engine.run.events import EventWriter
from engine.run.generations import Generation

CONFIG = configs.resolve(configs.load("smoke"))
SIZE = 1000


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs", CONFIG)


def finish(run: RunDirectory) -> None:
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(events.RunStarted(id=run.id, pid=1, host="h", device="cpu", versions={}, argv=[]))
        writer.emit(events.RunFinished(outcome="done", exit_code=0, seconds=1.0))


def commit(run: RunDirectory, number: int, *blocks: bytes) -> list[Path]:
    """A generation of objects with these contents; their files."""
    made = {}
    generations.objects_path(run.checkpoints_dir).mkdir(exist_ok=True)
    for index, content in enumerate(blocks):
        digest = hashlib.sha256(content).hexdigest()
        generations.object_path(run.checkpoints_dir, digest).write_bytes(content)
        made[f"block-{index:03d}"] = digest
    path = generations.generation_path(run.checkpoints_dir, number)
    path.write_bytes(Generation(number, made).encode())
    (run.checkpoints_dir / "CURRENT").write_text(f"{number}\n")
    return [generations.object_path(run.checkpoints_dir, digest) for digest in made.values()]


def numbers(run: RunDirectory) -> list[int]:
    return sorted(int(path.stem[-6:]) for path in run.checkpoints_dir.glob("generation-*.json"))


# -- generations ---------------------------------------------------------------------------------------


def test_a_finished_run_keeps_one_generation_and_another_two(run: RunDirectory) -> None:
    for number in (1, 2, 3):
        objects = commit(run, number, b"shared", bytes([number]) * SIZE)
    assert housekeeping.clean_run(run, dry_run=True) == housekeeping.clean_run(run)
    assert numbers(run) == [2, 3]
    finish(run)
    freed = housekeeping.clean_run(run)
    assert numbers(run) == [3]
    assert freed > SIZE
    assert sorted(objects) == sorted(generations.objects_path(run.checkpoints_dir).iterdir())
    assert housekeeping.clean_run(run) == 0


@pytest.mark.parametrize("damage", ["generation file", "object", "missing object"])
def test_the_only_good_generation_is_never_cleaned_away(run: RunDirectory, damage: str) -> None:
    """Of a finished run the newest would suffice, were it intact."""
    good = commit(run, 1, b"first")
    (newest,) = commit(run, 2, b"second")
    finish(run)
    if damage == "generation file":
        generations.generation_path(run.checkpoints_dir, 2).write_text("{")
    elif damage == "object":
        newest.write_bytes(b"secomd")
    else:
        newest.unlink()
    housekeeping.clean_run(run)
    assert numbers(run) == [1, 2]
    assert all(path.exists() for path in good)


def test_generations_that_say_nothing_cost_no_objects(run: RunDirectory) -> None:
    objects = [*commit(run, 1, b"first"), *commit(run, 2, b"second")]
    for number in (1, 2):
        generations.generation_path(run.checkpoints_dir, number).write_text("{")
    assert housekeeping.clean_run(run) == 0
    assert all(path.exists() for path in objects)


# -- what lies around ----------------------------------------------------------------------------------


def test_every_leftover_is_counted_once_and_removed_and_nothing_else(run: RunDirectory) -> None:
    finish(run)
    (run.cache_dir / "streams").mkdir()
    (run.export_dir / "gptq_v2").mkdir()
    (run.export_dir / "other.old").mkdir()
    garbage = [
        run.cache_dir / "evaluation.bin",
        run.cache_dir / ".hidden.tmp",
        run.cache_dir / "streams" / "a.raw",
        run.path / ".status.json.1.ab.tmp",
        run.control_dir / ".request.json.1.ab.tmp",
        run.checkpoints_dir / ".CURRENT.1.ab.tmp",
    ]
    for folder in ("gptq_v2.partial", "gptq_v2.failed", "gptq_v2.old"):
        (run.export_dir / folder).mkdir()
        garbage.append(run.export_dir / folder / "model.safetensors")
    kept = [
        run.export_dir / "gptq_v2" / "model.safetensors",
        run.export_dir / "other.old" / "model.safetensors",  # its successor is not there
        run.logs_dir / "attempt-001.log",
        run.path / "notes.txt",
    ]
    for path in (*garbage, *kept):
        path.write_bytes(bytes(SIZE))
    assert housekeeping.clean_run(run, dry_run=True) == SIZE * len(garbage)
    assert all(path.exists() for path in garbage)
    assert housekeeping.clean_run(run) == SIZE * len(garbage)
    assert not any(path.exists() for path in garbage)
    assert all(path.exists() for path in kept)


def test_links_out_of_a_run_are_not_followed(run: RunDirectory, tmp_path: Path) -> None:
    other = RunDirectory.create(tmp_path / "elsewhere", CONFIG)
    for number in (1, 2, 3):
        commit(other, number, bytes([number]))
    (other.cache_dir / "precious").write_text("keep")
    (other.export_dir / "x.failed").write_text("keep")
    for folder in (run.cache_dir, run.checkpoints_dir, run.export_dir):
        folder.rmdir()
        folder.symlink_to(other.path / folder.name)
    before = sorted(other.path.rglob("*"))
    assert housekeeping.clean_run(run) == 0
    assert sorted(other.path.rglob("*")) == before
    housekeeping.delete_run(run)
    assert not run.path.exists()
    assert [path for path in sorted(other.path.rglob("*")) if path.name != "lock"] == before


# -- somebody else -------------------------------------------------------------------------------------


def test_an_engine_that_is_just_starting_is_left_alone(run: RunDirectory) -> None:
    """It has not taken the lock yet; cleaning would take it away from it."""
    pid = launch.launch(run, module=("-c", "import time; time.sleep(60)"))
    try:
        for work in (housekeeping.clean_run, housekeeping.delete_run):
            with pytest.raises(PreflightError, match=f"process {pid}"):
                work(run)
    finally:
        os.kill(pid, signal.SIGKILL)
    while launch.exit_code(pid) is None:
        time.sleep(0.01)
    housekeeping.delete_run(run)
    assert not run.path.exists()


def test_two_may_finish_the_same_deletion(run: RunDirectory) -> None:
    for index in range(300):
        (run.cache_dir / f"{index}").write_text("x")
    run.path.rename(run.path.with_name(f".removed-{run.id}-00000000"))
    place = run.path.parent
    failures = []

    def clean() -> None:
        try:
            housekeeping.clean_leftovers(place)
        except PreflightError as error:
            failures.append(error)

    threads = [threading.Thread(target=clean) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(place.iterdir()) == []
    assert list_runs(place) == []
