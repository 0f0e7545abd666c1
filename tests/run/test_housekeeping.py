"""Deleting and cleaning: nothing that a run needs goes, and nothing outside of it."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from engine.config.derived import resolve
from engine.config.loading import load
from engine.errors import PreflightError
from engine.run import events, generations, housekeeping, launch
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.finding import list_runs
from engine.run.generations import Generation

CONFIG = resolve(load("smoke"))
SIZE = 1000


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
    generations.publish(run.checkpoints_dir, Generation(number, made))
    return [generations.object_path(run.checkpoints_dir, digest) for digest in made.values()]


def numbers_of_generations(run: RunDirectory) -> list[int]:
    return sorted(int(path.stem[11:17]) for path in run.checkpoints_dir.glob("generation-0*.json"))


# -- generations ---------------------------------------------------------------------------------------


def test_a_finished_run_keeps_one_generation_and_another_two(run: RunDirectory) -> None:
    for number in (1, 2, 3):
        objects = commit(run, number, b"shared", bytes([number]) * SIZE)
    assert housekeeping.clean_run(run, dry_run=True) == housekeeping.clean_run(run)
    assert numbers_of_generations(run) == [2, 3]
    finish(run)
    freed = housekeeping.clean_run(run)
    assert numbers_of_generations(run) == [3]
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
    assert numbers_of_generations(run) == [1, 2]
    assert all(path.exists() for path in good)


def test_generations_that_say_nothing_cost_no_objects(run: RunDirectory) -> None:
    objects = [*commit(run, 1, b"first"), *commit(run, 2, b"second")]
    for number in (1, 2):
        generations.generation_path(run.checkpoints_dir, number).write_text("{")
    assert housekeeping.clean_run(run) == 0
    assert all(path.exists() for path in objects)


# -- what lies around ----------------------------------------------------------------------------------


def test_every_leftover_is_counted_once_and_removed_and_nothing_else(run: RunDirectory) -> None:
    """Names that are nearly ours belong to the user."""
    finish(run)
    generations.objects_path(run.checkpoints_dir).mkdir()
    (run.export_dir / "gptq_v2").mkdir()
    (run.cache_dir / "teacher.bin").mkdir()
    (run.cache_dir / "streams-009-full.raw").symlink_to(run.config_toml)
    digest, request = "a" * 64, f"{'1' * 20}-{'a' * 8}"
    garbage = [
        run.cache_dir / "evaluation.bin",
        run.cache_dir / "tasks-128.bin",
        run.cache_dir / "streams-012-quantized.raw",
        run.cache_dir / ".streams-012-full.raw.7.0123abcd.tmp",
        run.path / ".status.json.1.0123abcd.tmp",
        run.control_dir / f".{request}.json.1.0123abcd.tmp",
        run.checkpoints_dir / ".CURRENT.1.0123abcd.tmp",
        run.checkpoints_dir / ".generation-000001.json.1.0123abcd.tmp",
        run.checkpoints_dir / "objects" / f".{digest}.safetensors.1.0123abcd.tmp",
    ]
    for ending in (".partial", ".failed", ".old"):
        (run.export_dir / f"gptq_v2{ending}").mkdir()
        garbage.append(run.export_dir / f"gptq_v2{ending}" / "model.safetensors")
    (run.export_dir / "mine.partial").mkdir()
    kept = [
        run.export_dir / "gptq_v2" / "model.safetensors",
        run.export_dir / "mine.partial" / "model.safetensors",
        run.export_dir / "notes.failed",
        run.logs_dir / "attempt-001.log",
        run.path / "notes.txt",
        run.path / ".notes.txt.1.0123abcd.tmp",
        run.path / ".status.json.1.ab.tmp",
        run.control_dir / ".notes.json.1.0123abcd.tmp",
        run.cache_dir / "results.bin",
        run.cache_dir / "streams.raw",
        run.cache_dir / "streams-012-mine.raw",
        run.cache_dir / "teacher.bin" / "inside",
        run.checkpoints_dir / ".notes.1.0123abcd.tmp",
        run.checkpoints_dir / "objects" / ".draft.safetensors.1.0123abcd.tmp",
    ]
    for path in (*garbage, *kept):
        path.write_bytes(bytes(SIZE))
    assert housekeeping.clean_run(run, dry_run=True) == SIZE * len(garbage)
    assert all(path.exists() for path in garbage)
    assert housekeeping.clean_run(run) == SIZE * len(garbage)
    assert not any(path.exists() for path in garbage)
    assert all(path.exists() for path in kept)
    assert (run.cache_dir / "streams-009-full.raw").is_symlink()
    assert housekeeping.foreign_in_cache(run) == ["results.bin", "streams-012-mine.raw", "streams.raw"]


def test_a_replaced_export_without_its_successor_is_the_only_one_and_stays(run: RunDirectory) -> None:
    (run.export_dir / "gptq_v2.old").mkdir()
    (run.export_dir / "gptq_v2.old" / "model.safetensors").write_bytes(bytes(SIZE))
    assert housekeeping.clean_run(run) == 0
    assert (run.export_dir / "gptq_v2.old" / "model.safetensors").exists()


def test_pruning_takes_no_file_of_the_users(run: RunDirectory) -> None:
    for number in (1, 2, 3):
        commit(run, number, bytes([number]))
    theirs = [
        run.checkpoints_dir / "generation-best.json",
        run.checkpoints_dir / ".notes.tmp",
        run.checkpoints_dir / "objects" / ".notes.tmp",
        run.checkpoints_dir / "objects" / "adapter.safetensors",
    ]
    for path in theirs:
        path.write_bytes(bytes(SIZE))
    housekeeping.clean_run(run)
    assert numbers_of_generations(run) == [2, 3]
    assert all(path.exists() for path in theirs)


def test_links_out_of_a_run_are_not_followed(run: RunDirectory, tmp_path: Path) -> None:
    other = RunDirectory.create(tmp_path / "elsewhere", CONFIG)
    for number in (1, 2, 3):
        commit(other, number, bytes([number]))
    (other.cache_dir / "full.bin").write_text("keep")
    (other.export_dir / "gptq_v2.failed").mkdir()
    for folder in (run.cache_dir, run.checkpoints_dir, run.export_dir):
        folder.rmdir()
        folder.symlink_to(other.path / folder.name)
    before = sorted(other.path.rglob("*"))
    assert housekeeping.clean_run(run) == 0
    with pytest.raises(PreflightError, match="is a link, which no run has"):
        housekeeping.delete_run(run)
    assert sorted(other.path.rglob("*")) == before


@pytest.mark.parametrize("spoilt", ["", "[tool]\nx = 1\n", "not = [toml", "no config", "no control"])
def test_what_was_not_made_as_a_run_is_not_cleaned(run: RunDirectory, spoilt: str) -> None:
    """A project may have a ``cache/full.bin``, and even a copy of a run's configuration."""
    if spoilt == "no control":
        run.control_dir.rmdir()
    elif spoilt == "no config":
        run.config_toml.unlink()
    else:
        run.config_toml.write_text(spoilt)
    (run.cache_dir / "full.bin").write_bytes(bytes(SIZE))
    with pytest.raises(PreflightError, match=r"config\.toml|control is missing"):
        housekeeping.clean_run(run)
    assert (run.cache_dir / "full.bin").exists()


def test_the_end_of_a_run_removes_its_activations_and_nothing_of_the_users(
    run: RunDirectory, tmp_path: Path
) -> None:
    (run.cache_dir / "full.bin").write_bytes(bytes(SIZE))
    housekeeping.remove_cache(run)
    assert not run.cache_dir.exists()
    housekeeping.remove_cache(run)  # there is none any more
    run.cache_dir.mkdir()
    for name in ("streams-003-full.raw", "notes.txt"):
        (run.cache_dir / name).write_bytes(bytes(SIZE))
    housekeeping.remove_cache(run)
    assert [path.name for path in run.cache_dir.iterdir()] == ["notes.txt"]


def test_the_end_of_a_run_removes_nothing_through_a_link(run: RunDirectory, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "full.bin").write_bytes(bytes(SIZE))
    run.cache_dir.rmdir()
    run.cache_dir.symlink_to(elsewhere)
    housekeeping.remove_cache(run)
    assert (elsewhere / "full.bin").exists()
    assert run.cache_dir.is_symlink()


# -- tokenized text ------------------------------------------------------------------------------------


def test_of_tokenized_text_only_what_the_engine_stores_is_forgotten(tmp_path: Path) -> None:
    """The cache may be a folder of the user's."""
    ours = ["0123456789abcdef" * 2 + "01234567.safetensors", ".0123456789ab-x_y1z2w3"]
    theirs = [
        "model.safetensors",
        "A" * 40 + ".safetensors",
        "a" * 39 + ".safetensors",
        ".0123456789ab-notes.txt",
    ]
    for name in (*ours, *theirs):
        (tmp_path / name).write_bytes(bytes(SIZE))
    (tmp_path / f"{'b' * 40}.safetensors").mkdir()
    (tmp_path / f"{'c' * 40}.safetensors").symlink_to(tmp_path / "model.safetensors")
    assert housekeeping.clean_tokens(tmp_path, dry_run=True) == SIZE * len(ours)
    assert housekeeping.clean_tokens(tmp_path) == SIZE * len(ours)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([*theirs, f"{'b' * 40}.safetensors", f"{'c' * 40}.safetensors"])
    assert housekeeping.clean_tokens(tmp_path / "absent") == 0


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
