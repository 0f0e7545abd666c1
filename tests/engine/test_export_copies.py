"""``eqat export --to FOLDER``: what was verified is copied, not made again, and the folder is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_runs import exported, of, run_here

from engine.errors import UsageError
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.run.shown import show_run
from engine.run.state import load_state
from eqat_tui.display import lasting_line
from eqat_tui.run_text import report

Make = Callable[..., RunDirectory]
COPY = ("--task", "export", "--format", "gptq_v2", "--to")


def phases(run: RunDirectory, attempt: int) -> list[str]:
    return [event.phase for event in of(run, events.PhaseStarted, attempt)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_verified_export_is_copied_without_opening_the_model(finished_copy: Make, tmp_path: Path) -> None:
    run = finished_copy()
    before, folder = exported(run), tmp_path / "a new place" / "copy"
    assert run_here(run, *COPY, str(folder)) == 0
    assert phases(run, 2) == ["export"]
    assert files(folder) == files(run.export_dir / "gptq_v2")
    assert exported(run) == before
    first, second = of(run, events.Export)
    assert (first.copied_to, second.copied_to) == ("", str(folder))
    assert (first.max_logit_diff, first.files) == (second.max_logit_diff, second.files)
    assert first.files == before
    assert second.t > first.t
    # What is printed names the folder, while it is followed and at the end.
    assert str(folder) in (lasting_line(second) or "")
    assert f"copied to {folder}" in report(show_run(run))
    assert run_state(run) == "done"
    job = load_state(run).job
    assert job is not None
    assert (job.task, job.outcome) == ("export", "done")


@pytest.mark.parametrize("how", ["changed", "removed", "added", "gone"])
def test_an_export_that_was_changed_is_made_and_verified_again(
    finished_copy: Make, tmp_path: Path, how: str
) -> None:
    run = finished_copy()
    before, place = exported(run), run.export_dir / "gptq_v2"
    (weights,) = place.glob("*.safetensors")
    if how == "changed":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
    elif how == "removed":
        (place / "config.json").unlink()
    elif how == "added":
        (place / "pytorch_model.bin").write_bytes(b"x")
    else:
        place.rename(tmp_path / "elsewhere")
    assert run_here(run, *COPY, str(tmp_path / "copy")) == 0
    assert phases(run, 2) == ["prepare", "export"]
    assert exported(run) == before
    assert files(tmp_path / "copy") == files(place)
    (warning,) = [event for event in of(run, events.Warning, 2) if event.code == "export"]
    assert "made again" in warning.message


def test_an_export_that_nobody_asks_a_copy_of_is_made_again(finished_copy: Make) -> None:
    run = finished_copy()
    assert run_here(run, *COPY[:-1]) == 0
    assert phases(run, 2) == ["prepare", "export"]


def test_an_export_of_a_log_without_digests_is_made_again(finished_copy: Make, tmp_path: Path) -> None:
    """Of the version before."""
    run = finished_copy()
    lines = run.events_path.read_text().splitlines(keepends=True)
    kept = [line if '"kind":"export"' not in line else line.split(',"files":')[0] + "}\n" for line in lines]
    run.events_path.write_text("".join(kept))
    assert of(run, events.Export)[0].files == {}
    assert run_here(run, *COPY, str(tmp_path / "copy")) == 0
    assert phases(run, 2) == ["prepare", "export"]


def test_a_folder_that_is_not_empty_is_refused_and_the_run_stays_done(
    finished_copy: Make, tmp_path: Path
) -> None:
    run = finished_copy()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").touch()
    assert run_here(run, *COPY, str(tmp_path / "copy")) == 2
    assert os.listdir(tmp_path / "copy") == ["mine"]
    assert run_state(run) == "done"
    with pytest.raises(UsageError, match="not an empty folder"):
        raise UsageError(of(run, events.Error)[-1].message)
