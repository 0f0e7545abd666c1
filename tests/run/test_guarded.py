"""Files that somebody else may have made: nothing is followed or waited for, and nothing is too large."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from msgspec import Struct

from engine.errors import PreflightError
from engine.system import guarded
from engine.system.files import atomic_write, make_folder, overwrite_in_place
from engine.system.guarded import (
    BadFile,
    NoFile,
    open_regular,
    opened_folder,
    read_bytes,
    read_object,
    read_struct,
    read_text,
    read_toml,
)


class Point(Struct, frozen=True):
    x: int
    name: str = ""


def odd_files(folder: Path) -> dict[str, Path]:
    """One of every kind of thing that is not a file of the run's own."""
    secret = folder.parent / "secret"
    secret.write_text('{"x": 1}')
    places = {name: folder / name for name in ("link", "dangling", "zero", "fifo", "socket", "folder")}
    places["link"].symlink_to(secret)
    places["dangling"].symlink_to(folder / "absent")
    places["zero"].symlink_to("/dev/zero")
    os.mkfifo(places["fifo"])
    # Binding takes at most 108 bytes of name; a folder's descriptor is a short one.
    with opened_folder(folder) as fd, socket.socket(socket.AF_UNIX) as one:
        one.bind(f"/proc/self/fd/{fd}/socket")
    places["folder"].mkdir()
    return places


def test_only_regular_files_are_read_and_nothing_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name, path in odd_files(folder).items():
        with pytest.raises(BadFile) as caught:
            read_bytes(path, 100)
        assert caught.value.where == str(path)
        assert not isinstance(caught.value, NoFile), name


def test_links_are_followed_where_they_were_judged_but_never_to_a_device_or_a_fifo(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    places = odd_files(folder)
    assert read_bytes(places["link"], 100, follow=True) == b'{"x": 1}'
    for name in ("zero", "fifo", "socket", "folder", "dangling"):
        with pytest.raises(BadFile):
            read_bytes(places[name], 100, follow=True)


def test_no_folder_below_the_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "objects").mkdir(parents=True)
    (tmp_path / "elsewhere" / "objects" / "x").write_bytes(b"1")
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    inside = run / "checkpoints" / "objects" / "x"
    assert read_bytes(inside, 10) == b"1"  # who says no root vouches for the folder
    with pytest.raises(BadFile):
        read_bytes(inside, 10, root=run)
    with pytest.raises(PreflightError):
        atomic_write(inside, b"2", root=run)
    with pytest.raises(PreflightError):
        make_folder(run / "checkpoints" / "made", root=run)
    assert inside.read_bytes() == b"1"
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["objects"]


def test_no_path_below_the_root_leads_out_of_it_again(tmp_path: Path) -> None:
    (tmp_path / "run" / "inner").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"1")
    for path in (Path("..", "secret"), Path("inner", "..", "..", "secret")):
        with pytest.raises(BadFile):
            read_bytes(tmp_path / "run" / path, 10, root=tmp_path / "run")
        with pytest.raises(PreflightError):
            atomic_write(tmp_path / "run" / path, b"2", root=tmp_path / "run")
    assert (tmp_path / "secret").read_bytes() == b"1"


def test_a_root_that_became_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with pytest.raises(NotADirectoryError), opened_folder(tmp_path / "run"):
        pass
    with pytest.raises(PreflightError):
        atomic_write(tmp_path / "run" / "x", b"1")
    assert not list((tmp_path / "real").iterdir())


def test_a_link_under_a_files_own_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "status.json").symlink_to(precious)
    assert not overwrite_in_place(tmp_path / "status.json", b"{}")
    atomic_write(tmp_path / "status.json", b"{}")
    assert precious.read_text() == "mine"
    assert not (tmp_path / "status.json").is_symlink()
    os.mkfifo(tmp_path / "fifo")
    assert not overwrite_in_place(tmp_path / "fifo", b"{}")


def test_no_more_is_read_than_the_kind_of_file_can_need(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(BadFile, match="larger than the 4 bytes"):
        read_bytes(path, 4)
    with open(path, "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadFile, match="larger"):
        read_object(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"x"',
        b"\xff\xfe{}",
        b'{"x": ' + b"1" * 5000 + b"}",
        b'{"x": ' + b"[" * 100_000,
        b'{"x": "\\ud800"}'[:-3],
    ],
)
def test_whatever_a_parser_raises_is_one_error_with_the_files_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    for read in (read_object, lambda place: read_struct(place, Point)):
        with pytest.raises(BadFile) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"x", b"x = " + b"1" * 5000, b"x = " + b"[" * 5000, b"\xff = 1", b"x = 1\nx = 2", b"x = 9e999x"],
)
def test_the_same_for_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(BadFile) as caught:
        read_toml(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", ['{"x": 1.5}', '{"x": "1"}', '{"x": null}', '{"x": NaN}', '{"name": "a"}']
)
def test_fields_have_types(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BadFile):
        read_struct(path, Point)


def test_what_is_right_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"x": 1, "other": NaN}')
    assert read_object(tmp_path / "x.json")["x"] == 1
    (tmp_path / "y.json").write_text('{"x": 1, "later": true}')
    assert read_struct(tmp_path / "y.json", Point) == Point(1)
    (tmp_path / "x.toml").write_text("x = 1")
    assert read_toml(tmp_path / "x.toml") == {"x": 1}
    assert read_text(tmp_path / "x.toml") == "x = 1"
    with pytest.raises(NoFile):
        read_text(tmp_path / "absent")
    with pytest.raises(NoFile):
        read_text(tmp_path / "absent" / "absent")


def test_a_file_that_comes_while_it_is_asked_for_was_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another process writes the first one: no damage, only too early."""
    path, opened = tmp_path / "first.json", guarded.open_regular

    def too_early(*arguments: object, **options: object) -> int:
        try:
            return opened(*arguments, **options)  # type: ignore[arg-type]
        finally:
            path.write_text("{}")

    monkeypatch.setattr(guarded, "open_regular", too_early)
    with pytest.raises(NoFile):
        read_bytes(path, 10)
    assert read_bytes(path, 10) == b"{}"
    nowhere = tmp_path / "link"
    nowhere.symlink_to(tmp_path / "nothing")
    with pytest.raises(BadFile) as caught:
        read_bytes(nowhere, 10, follow=True)
    assert not isinstance(caught.value, NoFile), "a link that leads nowhere is there"


def test_a_folder_is_made_only_in_one_that_is_there(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "a")
    with pytest.raises(PreflightError):
        make_folder(tmp_path / "gone" / "b")
    assert not (tmp_path / "gone").exists()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("file", "link"):
        with pytest.raises(PreflightError, match="folder should be"):
            make_folder(tmp_path / name)


def test_writing_opens_neither_links_nor_fifos(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in ("fifo", "link"):
        with pytest.raises((OSError, BadFile)):
            os.close(open_regular(tmp_path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    assert not (tmp_path / "new").exists()
