"""Going on, doing a part again, and cleaning up, as typed, with the real engine."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import Eqat, environment
from engine_runs import start
from waiting import PATIENCE

from engine.config.loading import load
from engine.run import generations
from engine.run.directory import RunDirectory
from engine.run.finding import list_runs
from engine.run.liveness import run_state
from engine.run.lock import RunLock
from engine.system.user_cache import token_cache

SMALL = {
    "block_ap.sequences": 4,
    "block_ap.val_sequences": 2,
    "block_ap.epochs": 1,
    "e2e_qp.sequences": 4,
    "evaluation.windows": 2,
    "runtime.checkpoint_minutes": 1e-4,
    "runtime.checkpoint_share": 1.0,
    "runtime.streams": "stored",
}


def settings(**changes: object) -> list[str]:
    return [word for name, value in {**SMALL, **changes}.items() for word in ("--set", f"{name}={value}")]


def finished(tmp_path: Path, **changes: object) -> RunDirectory:
    """A run that is over, by an engine that need not load its libraries first."""
    overrides = {"runtime.device": "cpu", **SMALL, **changes}
    run = RunDirectory.create(tmp_path / "runs", load("smoke", overrides=overrides))
    assert start(run).code() == 0
    return run


def weights(run: RunDirectory) -> str:
    return hashlib.sha256((run.export_dir / "gptq_v2" / "model.safetensors").read_bytes()).hexdigest()


def objects(run: RunDirectory) -> dict[str, int]:
    """Inode of every block's object, by entry."""
    number = generations.newest(run.checkpoints_dir)
    found = generations.read_generation(run.checkpoints_dir, number)
    return {
        name: generations.object_path(run.checkpoints_dir, digest).stat().st_ino
        for name, digest in found.entries.items()
    }


# -- doing a part again --------------------------------------------------------------------------------


def test_redo_trains_later_blocks_again_into_a_new_run_that_shares_what_came_before(
    eqat: Eqat, tmp_path: Path
) -> None:
    first = finished(tmp_path)
    before = weights(first), objects(first)
    done = eqat("resume", first.id, "--from-block", "2", "--set", "block_ap.epochs=3")
    assert done.returncode == 0, done.stderr
    assert f"sharing blocks 0 to 1 of {first.id}" in done.stderr
    (second,) = [run for run in list_runs(tmp_path / "runs") if run.id != first.id]
    assert second.config().block_ap.epochs == 3
    assert (weights(first), objects(first)) == before, "the first run is untouched"
    shared, mine = objects(first), objects(second)
    assert [mine[f"block-{i:03d}"] == shared[f"block-{i:03d}"] for i in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    assert weights(second) != weights(first)
    shown = json.loads(eqat("show", second.id, "--json").stdout)
    assert shown["origin"] == {"id": first.id, "path": str(first.path), "from_block": 2}
    assert f"blocks 0–1 of {first.id}" in eqat("show", second.id).stdout
    assert (
        shown["perplexity"]["fp"] == json.loads(eqat("show", first.id, "--json").stdout)["perplexity"]["fp"]
    )
    # The shared blocks outlive the run they came from.
    assert eqat("rm", first.id, "--yes").returncode == 0
    assert eqat("export", second.id).returncode == 0


def test_redo_with_the_same_settings_gives_the_same_bytes(eqat: Eqat, tmp_path: Path) -> None:
    first = finished(tmp_path)
    for block in ("3", "4"):
        assert eqat("resume", first.id, "--from-block", block).returncode == 0
    for run in list_runs(tmp_path / "runs"):
        assert weights(run) == weights(first)


def test_a_redo_that_cannot_be_is_refused_in_one_line(eqat: Eqat, tmp_path: Path) -> None:
    first = finished(tmp_path, **{"e2e_qp.enabled": False, "evaluation.enabled": False})
    for arguments, words in (
        (("--from-block", "9"), ("--from-block", "0 to 4")),
        (("--from-block", "1", "--set", "grid.bits=3"), ("grid.bits", "start a new run")),
        (("--from-block", "1", "--set", "model.source=elsewhere"), ("model.source",)),
        (("--from-block", "1", "--set", "block_ap.epocs=4"), ("block_ap.epochs",)),
    ):
        refused = eqat("resume", first.id, *arguments)
        assert refused.returncode == 2
        assert len(refused.stderr.strip().splitlines()) == 1
        for word in words:
            assert word in refused.stderr
    assert len(list_runs(tmp_path / "runs")) == 1


def test_resume_takes_operational_settings_and_refuses_deciding_ones(eqat: Eqat, tmp_path: Path) -> None:
    started = eqat("run", "smoke", "--device", "cpu", *settings(), "--detach")
    run = RunDirectory.open(tmp_path / "runs" / started.stdout.strip())
    eqat("stop", run.id, "--wait")
    refused = eqat("resume", run.id, "--set", "block_ap.epochs=7")
    assert refused.returncode == 2
    assert "block_ap.epochs" in refused.stderr
    assert "--from-block" in refused.stderr
    assert eqat("resume", run.id, "--set", "runtime.threads=fast").returncode == 2
    by_hand = subprocess.run(
        [sys.executable, "-m", "engine", str(run.path), "--set", "block_ap.epochs=7"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert by_hand.returncode == 8
    assert "block_ap.epochs" in by_hand.stderr
    gone_on = eqat("resume", run.id, "--set", "runtime.activation_store=disk", "--set", "runtime.threads=1")
    assert gone_on.returncode == 0, gone_on.stderr
    assert run.config().runtime.activation_store == "auto"
    assert "disk" in (run.events_path).read_text()


# -- housekeeping --------------------------------------------------------------------------------------


def test_rm_deletes_a_run_and_what_it_shares_stays(eqat: Eqat, tmp_path: Path) -> None:
    run = finished(tmp_path, **{"e2e_qp.enabled": False, "evaluation.enabled": False})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("keep")
    (run.export_dir / "link").symlink_to(elsewhere)
    refused = eqat("rm", run.id)
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert run.path.is_dir()
    assert eqat("rm", run.id, "-y").returncode == 0
    assert list((tmp_path / "runs").iterdir()) == []
    assert (elsewhere / "precious").read_text() == "keep"


def test_rm_asks_on_a_terminal(eqat: Eqat, tmp_path: Path, finished_run: RunDirectory) -> None:
    for answer, gone in ((b"n\n", False), (b"y\n", True)):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "eqat_tui", "rm", finished_run.id],
            cwd=tmp_path,
            env=environment(),
            stdin=theirs,
            stderr=subprocess.PIPE,
        )
        os.write(ours, answer)
        _, err = process.communicate(timeout=PATIENCE)
        assert b"Delete" in err
        assert (not finished_run.path.exists()) == gone


def test_the_end_of_input_deletes_nothing_and_a_run_named_twice_is_deleted_once(
    eqat: Eqat, tmp_path: Path, finished_run: RunDirectory
) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "eqat_tui", "rm", finished_run.id],
        cwd=tmp_path,
        env=environment(),
        stdin=theirs,
        stderr=subprocess.PIPE,
    )
    os.write(ours, b"\x04")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert b"nothing was deleted" in err
    assert b"Traceback" not in err
    done = eqat("rm", finished_run.id, str(finished_run.path), "-y")
    assert (done.returncode, done.stderr.count("deleted")) == (0, 1)


def test_a_log_that_cannot_be_read_is_one_line_and_hides_no_other_run(
    eqat: Eqat, new_run: Callable[[], RunDirectory], finished_run: RunDirectory
) -> None:
    broken = new_run()
    broken.events_path.mkdir()
    listed = eqat("runs", "--json")
    assert [row["id"] for row in json.loads(listed.stdout)] == [finished_run.id]
    assert f"{broken.id} is left out" in listed.stderr
    for command in (("show",), ("attach",), ("resume",), ("export",)):
        refused = eqat(*command, broken.id)
        assert refused.returncode == 3, command
        assert "events.jsonl: is a folder" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert eqat("gc").returncode == 0
    assert eqat("rm", broken.id, "--yes").returncode == 0


def test_gc_forgets_tokens_where_the_engine_keeps_them(
    eqat: Eqat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "cache"))
    token_cache().mkdir(parents=True)
    (token_cache() / f"{'a' * 40}.safetensors").write_bytes(bytes(700))
    (token_cache() / "mine.safetensors").write_bytes(bytes(700))
    (tmp_path / "cache" / "else").write_bytes(bytes(700))
    for arguments, left in ((("--tokens", "--dry-run"), 2), ((), 2), (("--tokens",), 1)):
        said = json.loads(eqat("gc", "--json", *arguments, EQAT_CACHE_DIR=str(tmp_path / "cache")).stdout)
        assert said["tokens"] == (700 if "--tokens" in arguments else 0)
        assert len(list(token_cache().iterdir())) == left
    assert (tmp_path / "cache" / "else").exists()


def test_a_run_that_is_being_worked_on_is_neither_deleted_nor_cleaned(
    eqat: Eqat, finished_run: RunDirectory
) -> None:
    (finished_run.cache_dir / "streams-001-full.raw").write_bytes(bytes(100))
    with RunLock(finished_run.lock_path):
        refused = eqat("rm", finished_run.id, "--yes")
        cleaned = eqat("gc", "--json")
    assert refused.returncode == 3
    assert f"process {os.getpid()}" in refused.stderr
    assert finished_run.path.is_dir()
    (row,) = json.loads(cleaned.stdout)["runs"]
    assert row["skipped"]
    assert row["freed"] == 0


def test_a_deletion_that_was_cut_off_leaves_no_run_and_gc_finishes_it(
    eqat: Eqat, tmp_path: Path, finished_run: RunDirectory
) -> None:
    hidden = finished_run.path.with_name(f".removed-{finished_run.id}-00000000")
    finished_run.path.rename(hidden)
    assert json.loads(eqat("runs", "--json").stdout) == []
    assert eqat("gc").returncode == 0
    assert not hidden.exists()


def test_gc_frees_caches_and_old_generations_and_the_run_still_goes_on_to_the_same_bytes(
    eqat: Eqat, tmp_path: Path
) -> None:
    whole = finished(tmp_path)
    expected = weights(whole)
    started = eqat("run", "smoke", "--device", "cpu", *settings(), "--detach")
    run = RunDirectory.open(tmp_path / "runs" / started.stdout.strip())
    eqat("stop", run.id, "--wait")
    assert run_state(run) == "stopped"
    run.cache_dir.mkdir(exist_ok=True)
    (run.cache_dir / "full.bin").write_bytes(bytes(5000))
    (run.export_dir / "gptq_v2.partial").mkdir(parents=True)
    (run.export_dir / "gptq_v2.partial" / "model.safetensors").write_bytes(bytes(3000))
    said = json.loads(eqat("gc", "--dry-run", "--json").stdout)
    assert said["freed"] >= 8000
    assert (run.cache_dir / "full.bin").exists()
    freed = json.loads(eqat("gc", "--json").stdout)
    assert freed["freed"] == said["freed"]
    assert list(run.cache_dir.iterdir()) == []
    assert list(run.export_dir.iterdir()) == []
    assert len(list(whole.checkpoints_dir.glob("generation-*.json"))) == 1
    assert eqat("resume", run.id).returncode == 0
    assert weights(run) == expected
    assert eqat("export", whole.id).returncode == 0, "a cleaned run can still be exported"
    assert weights(whole) == expected
