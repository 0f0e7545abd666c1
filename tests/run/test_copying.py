"""A copy of an export appears in a folder of the user's whole, or nothing does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.errors import EqatError, UsageError
from engine.system.copying import check_target, copy_whole

FILES = {"README.md": b"card", "model.safetensors": bytes(range(256)) * 1000}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "run"
    export = folder / "export" / "gptq_v2"
    (export / "templates").mkdir(parents=True)
    for name, content in FILES.items():
        (export / name).write_bytes(content)
    (export / "templates" / "a.jinja").write_text("{}")
    return folder


def export_of(run: Path) -> Path:
    return run / "export" / "gptq_v2"


def test_the_copy_is_the_export(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    long_name = "n" * 255
    for target in (tmp_path / "new", tmp_path / "empty", tmp_path / long_name):
        copy_whole(export_of(run), target, run=run)
        assert {name: (target / name).read_bytes() for name in FILES} == FILES
        assert (target / "templates" / "a.jinja").read_text() == "{}"
    assert sorted(os.listdir(tmp_path)) == sorted(["empty", "new", "runs", long_name])


def test_what_ends_the_copying_leaves_nothing_behind(run: Path, tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_whole(export_of(run), tmp_path / "new", run=run, poll=stop)
    assert os.listdir(tmp_path) == ["runs"]


@pytest.mark.parametrize("odd", ["link", "fifo", "link to a folder"])
def test_only_files_are_copied(run: Path, tmp_path: Path, odd: str) -> None:
    (tmp_path / "secret").write_text("secret")
    if odd == "fifo":
        os.mkfifo(export_of(run) / "odd")
    else:
        (export_of(run) / "odd").symlink_to(tmp_path / ("secret" if odd == "link" else ""))
    with pytest.raises(EqatError):
        copy_whole(export_of(run), tmp_path / "new", run=run)
    assert sorted(os.listdir(tmp_path)) == ["runs", "secret"]


def test_an_export_that_is_a_link_is_not_copied(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    export_of(run).rename(tmp_path / "real")
    export_of(run).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EqatError):
        copy_whole(export_of(run), tmp_path / "new", run=run)
    assert not (tmp_path / "new").exists()


def targets(run: Path, place: Path) -> dict[str, Path]:
    """One of every kind of place that an export cannot be copied to."""
    (place / "full").mkdir()
    (place / "full" / "file").write_text("mine")
    (place / "file").write_text("mine")
    os.mkfifo(place / "fifo")
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    (place / "dangling").symlink_to(place / "absent")
    (place / "into the run").symlink_to(run)
    return {
        "full": place / "full",
        "file": place / "file",
        "below a file": place / "file" / "new",
        "fifo": place / "fifo",
        "below a fifo": place / "fifo" / "new",
        "link": place / "link",
        "dangling": place / "dangling",
        "below a dangling link": place / "dangling" / "new",
        "run": run,
        "export": export_of(run),
        "inside the export": export_of(run) / "copy",
        "export folder": run / "export" / "copy",
        "inside the run": run / "copy",
        "through a link": place / "into the run" / "copy",
        "around a corner": place / "real" / ".." / "runs" / "run" / "copy",
        "proc": Path("/proc/copy"),
        "root": Path("/"),
        "zero byte": place / "a\0b",
        "too long": place / ("n" * 256),
    }


def test_folders_above_the_copy_are_made(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "copy"
    check_target(target, run)
    copy_whole(export_of(run), target, run=run)
    assert sorted(path.name for path in target.iterdir()) == sorted(
        path.name for path in export_of(run).iterdir()
    )


def test_a_place_that_cannot_take_it_is_refused_in_one_line_and_stays_as_it_was(
    run: Path, tmp_path: Path
) -> None:
    for name, target in targets(run, tmp_path).items():
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        for attempt in (check_target, lambda target, run: copy_whole(export_of(run), target, run=run)):
            with pytest.raises(UsageError) as caught:
                attempt(target, run)
            assert "\n" not in str(caught.value), name
            assert caught.value.hint, name
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
