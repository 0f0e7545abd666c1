"""Under the name of an export there is, at every instant, a whole export that was verified."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EqatError, ExitCode, PreflightError
from engine.export import place as place_module
from engine.export.place import ExportPlace, exchange
from engine.system.guarded import opened_folder

PRECIOUS = "precious"
FILES = ("README.md", "config.json", "model.safetensors")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "export").mkdir(parents=True)
    return folder


def place_in(run: Path) -> ExportPlace:
    return ExportPlace(run / "export" / "gptq_v2", run)


def write(run: Path, content: str) -> None:
    """A whole export, as the engine writes one."""
    place = place_in(run)
    with place.being_made() as partial:
        for name in FILES:
            (partial / name).write_text(content)
        place.publish()


def whole(folder: Path) -> str | None:
    """What is written in every file of an export that is all there."""
    if not folder.is_dir() or folder.is_symlink() or sorted(os.listdir(folder)) != sorted(FILES):
        return None
    found = {(folder / name).read_text() for name in FILES}
    return found.pop() if len(found) == 1 else None


def content(run: Path) -> str | None:
    return whole(run / "export" / "gptq_v2")


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run / "export"))


def killed_at(run: Path, point: int) -> bool:
    """Write a new export in a process that is killed before its n-th access to the file system; whether it
    came to that."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def pass_point(event: str, arguments: Any) -> None:
            nonlocal seen
            if event.startswith(("os.", "shutil.", "ctypes.")) or event == "open":
                seen += 1
                if seen == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(pass_point)
            write(run, "new")
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place_module, "exchange", lambda one, other, folder: False)


@pytest.mark.parametrize("before", ["old", None])
@pytest.mark.parametrize("atomic", [True, False])
def test_killed_at_every_access_the_name_has_the_old_or_the_new_export_whole(
    run: Path, before: str | None, atomic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not atomic:
        no_exchange(monkeypatch)
    found: set[str | None] = set()
    struck, point = 0, 1
    while True:
        shutil.rmtree(run / "export")
        (run / "export").mkdir()
        if before:
            write(run, before)
        if not killed_at(run, point):
            break
        struck, point = struck + 1, point + 1
        if not atomic and content(run) is None and before:
            assert whole(run / "export" / "gptq_v2.old") == before
            found.add("aside")
        place_in(run).recover()
        assert content(run) in (before, "new"), point
        assert names(run) == (["gptq_v2"] if content(run) else [])
        found.add(content(run))
        write(run, "newer")
        assert (content(run), names(run)) == ("newer", ["gptq_v2"])
    assert struck > 20
    assert found == {before, "new"} | ({"aside"} if before and not atomic else set())
    assert (content(run), names(run)) == ("new", ["gptq_v2"])


def test_the_file_system_exchanges_two_names_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with opened_folder(tmp_path) as folder:
        if not exchange("one", "other", folder):
            pytest.skip("this file system cannot exchange names")
        with pytest.raises(FileNotFoundError):
            exchange("one", "absent", folder)
    assert (tmp_path / "one" / "file").read_text() == "other"
    assert (tmp_path / "other" / "file").read_text() == "one"


@pytest.mark.parametrize("atomic", [True, False])
def test_what_is_not_verified_leaves_the_old_export_and_is_kept_beside_it(
    run: Path, atomic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not atomic:
        no_exchange(monkeypatch)
    write(run, "old")
    for text in ("bad", "worse"):
        place = place_in(run)
        with place.being_made() as partial:
            for name in FILES:
                (partial / name).write_text(text)
            place.keep_as_failed()
        assert content(run) == "old"
        assert whole(run / "export" / "gptq_v2.failed") == text
        assert names(run) == ["gptq_v2", "gptq_v2.failed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), KeyError(1)])
def test_whatever_ends_the_writing_leaves_the_old_export_and_nothing_half_written(
    run: Path, error: BaseException
) -> None:
    write(run, "old")

    def fail() -> None:
        with place_in(run).being_made() as partial:
            (partial / FILES[0]).write_text("half")
            raise error

    with pytest.raises(EqatError if isinstance(error, OSError) else type(error)) as caught:
        fail()
    if isinstance(caught.value, EqatError):
        assert caught.value.exit_code == ExitCode.DISK_FULL
    assert (content(run), names(run)) == ("old", ["gptq_v2"])


def test_a_name_that_cannot_be_taken_stays_with_the_old_export(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of the two renames has no room for a name."""
    write(run, "old")
    no_exchange(monkeypatch)
    real = os.rename

    def rename(source: str, target: str, **options: Any) -> None:
        if source.endswith(".partial"):
            raise OSError(28, "No space left on device")
        real(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(EqatError) as caught:
        write(run, "new")
    assert caught.value.exit_code == ExitCode.DISK_FULL
    assert (content(run), names(run)) == ("old", ["gptq_v2"])


# -- what somebody else has put there ------------------------------------------------------------------


def put_link(place: Path, elsewhere: Path) -> None:
    place.symlink_to(elsewhere)


def put_fifo(place: Path, elsewhere: Path) -> None:
    os.mkfifo(place)


def put_file(place: Path, elsewhere: Path) -> None:
    place.write_text("in the way")


def put_folder_with_a_link(place: Path, elsewhere: Path) -> None:
    place.mkdir()
    (place / "inner").symlink_to(elsewhere)


def put_dangling(place: Path, elsewhere: Path) -> None:
    place.symlink_to(elsewhere / "absent")


@pytest.mark.parametrize("suffix", ["", ".partial", ".old", ".failed"])
@pytest.mark.parametrize("put", [put_link, put_dangling, put_fifo, put_file, put_folder_with_a_link])
@pytest.mark.parametrize("atomic", [True, False])
def test_what_has_the_name_is_replaced_and_never_followed(
    run: Path,
    tmp_path: Path,
    put: Callable[[Path, Path], None],
    suffix: str,
    atomic: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not atomic:
        no_exchange(monkeypatch)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "README.md").write_text(PRECIOUS)
    if suffix:
        write(run, "old")
    put(run / "export" / f"gptq_v2{suffix}", elsewhere)
    place_in(run).recover()
    if suffix:
        assert content(run) == "old"
    write(run, "new")
    assert content(run) == "new"
    if suffix == ".failed":
        place = place_in(run)
        with place.being_made() as partial:
            (partial / "README.md").write_text("bad")
            place.keep_as_failed()
    assert names(run) == ["gptq_v2", *(["gptq_v2.failed"] if suffix == ".failed" else [])]
    assert [path.name for path in elsewhere.iterdir()] == ["README.md"]
    assert (elsewhere / "README.md").read_text() == PRECIOUS


def test_a_link_that_was_set_aside_is_not_given_the_name(run: Path, tmp_path: Path) -> None:
    (run / "export" / "gptq_v2.old").symlink_to(tmp_path)
    place_in(run).recover()
    assert names(run) == []


@pytest.mark.parametrize("put", [put_link, put_dangling, put_fifo, put_file])
def test_an_export_folder_that_is_none_is_refused_in_one_line(
    run: Path, tmp_path: Path, put: Callable[[Path, Path], None]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / "export").rmdir()
    put(run / "export", elsewhere)
    for attempt in (place_in(run).recover, lambda: write(run, "new")):
        with pytest.raises(PreflightError) as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert str(run / "export") in caught.value.where
    assert list(elsewhere.iterdir()) == []


def test_only_the_folder_that_was_written_gets_the_name(run: Path, tmp_path: Path) -> None:
    write(run, "old")
    place = place_in(run)

    def exchanged(by: Callable[[], object]) -> None:
        with place.being_made() as partial:
            shutil.rmtree(partial)
            by()
            place.publish()

    for by in (lambda: None, place.partial.mkdir, lambda: place.partial.symlink_to(tmp_path)):
        with pytest.raises(PreflightError, match="removed or exchanged"):
            exchanged(by)
        assert (content(run), names(run)) == ("old", ["gptq_v2"])


def test_a_link_among_the_files_is_not_published(run: Path, tmp_path: Path) -> None:
    place = place_in(run)

    def with_odd(make: Callable[[Path], None]) -> None:
        with place.being_made() as partial:
            make(partial / "odd")
            place.publish()

    for make in (lambda path: path.symlink_to(tmp_path / "x"), os.mkfifo):
        with pytest.raises(PreflightError):
            with_odd(make)
        assert names(run) == []


def test_a_run_that_was_deleted_is_not_made_again(run: Path) -> None:
    def deleted_before() -> None:
        write(run, "new")

    def deleted_meanwhile() -> None:
        place = place_in(run)
        with place.being_made():
            shutil.rmtree(run)
            place.publish()

    with pytest.raises(EqatError):
        deleted_meanwhile()
    assert not run.exists()
    with pytest.raises(EqatError):
        deleted_before()
    assert not run.exists()
