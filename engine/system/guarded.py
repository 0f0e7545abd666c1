"""Reading small files that somebody else may have made: a damaged run, a downloaded model, a folder of links.

A name says nothing about what lies behind it. A link leads to a private key or to ``/dev/zero``, a FIFO waits
for a writer for ever, a header announces more than there is memory. So a file is opened relative to a folder
that was opened before it, without following links below that folder and without waiting; it has to be a
regular file; no more of it is read than its kind can need; and whatever a parser raises on its content is one
error with the file's name (:class:`BadFile`), because a list of expected exceptions is never complete.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from engine.errors import PreflightError, first_line

T = TypeVar("T")

SMALL = 16 << 20
"""Bytes of a structured file that people and programs write by hand: far more than any has."""
LARGE = 256 << 20
"""Bytes of a structured file that grows with a model: the index of its shards, a header."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEVER_WAIT = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class BadFile(PreflightError):
    """A file that cannot be used as what its name promises; the message says why."""


class NoFile(BadFile):
    """There is nothing under this name."""


# -- opening -------------------------------------------------------------------------------------------


@contextmanager
def opened_folder(folder: Path, root: Path | None = None) -> Iterator[int]:
    """A descriptor of ``folder``, which must be a real folder, as must all between it and ``root``.

    ``root`` (by default the folder itself) is what was checked before; how it is reached is the user's
    affair.

    Raises:
        OSError: ``ELOOP`` or ``ENOTDIR`` for a link.
    """
    root = folder if root is None else root
    inside = folder.relative_to(root).parts
    if ".." in inside:  # it would lead out again
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
    fd = os.open(root, _FOLDER | os.O_NOFOLLOW)
    try:
        for part in inside:
            inner = open_inner(part, fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def open_inner(name: str, folder: int) -> int:
    """A descriptor of a folder in an opened folder; raises as :func:`opened_folder` for a link."""
    return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)


@contextmanager
def opened_inner(name: str, folder: int) -> Iterator[int]:
    """:func:`open_inner`, closed in the end."""
    fd = open_inner(name, folder)
    try:
        yield fd
    finally:
        os.close(fd)


def names_in(
    folder: Path,
    root: Path,
    wanted: Callable[[os.DirEntry[str]], bool] = lambda entry: not entry.is_symlink(),
) -> list[str]:
    """What lies directly in ``folder``, sorted: by default all but links, which are not ours.

    Raises:
        OSError: as :func:`opened_folder`, and where it cannot be looked into.
    """
    with opened_folder(folder, root) as opened, os.scandir(opened) as entries:
        return sorted(entry.name for entry in entries if wanted(entry))


def open_regular(
    path: Path, flags: int = os.O_RDONLY, *, root: Path | None = None, mode: int = 0o644, follow: bool = False
) -> int:
    """A descriptor of the regular file ``path``; never waits, never opens anything else.

    Nothing below ``root`` (by default the file's own folder) may be a link. With ``follow`` links are
    followed, for files of the user's own whose links were judged before, as those of a model's folder
    (:mod:`engine.architecture.model_folder`).

    Raises:
        OSError: what the system says; ``ELOOP`` for a link.
        BadFile: for a folder, a FIFO, a socket or a device; for writing also for a file that has a second
            name, which may be somebody's start-up file.
    """
    try:
        if follow:
            fd = os.open(path, flags | _NEVER_WAIT, mode)
        else:
            with opened_folder(path.parent, path.parent if root is None else root) as folder:
                fd = os.open(path.name, flags | _NEVER_WAIT | os.O_NOFOLLOW, mode, dir_fd=folder)
    except OSError as error:
        # What cannot be opened for writing without a reader, or at all.
        if error.errno in (errno.EISDIR, errno.ENXIO, errno.ENODEV):
            kind = "a folder" if error.errno == errno.EISDIR else "a FIFO, a socket or a device"
            raise BadFile(f"is {kind}, not a regular file", where=str(path)) from error
        raise
    try:
        status = os.fstat(fd)
        require_regular(status, path)
        if flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
            raise BadFile(
                "has another name somewhere (a hard link), and what is written into it would appear there",
                where=str(path),
                hint="copy it and put the copy in its place",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def require_regular(status: os.stat_result, path: Path) -> None:
    """BadFile for anything but a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise BadFile(f"is {kind_of(status.st_mode)}, not a regular file", where=str(path))


def kind_of(mode: int) -> str:
    """What a file that is not a regular one is, in words."""
    kinds: tuple[tuple[Callable[[int], bool], str], ...] = (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISREG, "a file"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((words for test, words in kinds if test(mode)), "a file of an unknown kind")


# -- reading -------------------------------------------------------------------------------------------


def read_bytes(path: Path, limit: int, *, root: Path | None = None, follow: bool = False) -> bytes:
    """The whole content of a regular file of at most ``limit`` bytes; ``root`` and ``follow`` as for
    :func:`open_regular`.

    Raises:
        NoFile: where there is none.
        BadFile: for anything else that stands in the way.
    """
    try:
        fd = open_regular(path, root=root, follow=follow)
        with os.fdopen(fd, "rb") as file:
            size = os.fstat(fd).st_size
            content = file.read(limit + 1) if size <= limit else b""
    except OSError as error:
        raise bad_file(error, path) from error
    except ValueError as error:  # a NUL in it
        raise BadFile("is no name that a file can have", where=repr(str(path))) from error
    # A file that still grows is longer than it said.
    if size > limit or len(content) > limit:
        raise BadFile(f"is larger than the {limit} bytes that such a file can have", where=str(path))
    return content


def read_text(path: Path, limit: int = SMALL, *, root: Path | None = None, follow: bool = False) -> str:
    """:func:`read_bytes` as UTF-8 text."""
    return parsed(
        lambda content: content.decode("utf-8"), read_bytes(path, limit, root=root, follow=follow), path
    )


def read_object(
    path: Path, limit: int = SMALL, *, root: Path | None = None, follow: bool = False
) -> dict[str, Any]:
    """A JSON object, as Python's own parser reads it (NaN and infinities included: others' programs write
    them); :class:`BadFile` for anything else."""
    return parse_object(read_bytes(path, limit, root=root, follow=follow), path)


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """What :func:`read_object` makes of the content of ``path``."""
    found = parsed(lambda data: json.loads(data.decode("utf-8")), content, path)
    if not isinstance(found, dict):
        raise BadFile("holds no JSON object", where=str(path))
    return found


def read_struct(path: Path, kind: type[T], limit: int = SMALL, *, root: Path | None = None) -> T:
    """JSON of the type ``kind``, every field checked: files of our own."""
    return parsed(lambda data: msgspec.json.decode(data, type=kind), read_bytes(path, limit, root=root), path)


def read_toml(
    path: Path, limit: int = SMALL, *, root: Path | None = None, follow: bool = False
) -> dict[str, Any]:
    """A TOML file as plain dicts and lists."""
    return parsed(tomllib.loads, read_text(path, limit, root=root, follow=follow), path, "TOML")


C = TypeVar("C")


def parsed(parse: Callable[[C], T], content: C, path: Path, language: str = "JSON") -> T:
    """``parse(content)``; whatever it raises is one :class:`BadFile`.

    Parsers raise more than their documentation names: on nesting, on numbers of 5000 digits, on text that is
    no UTF-8, on sizes that memory does not have.
    """
    try:
        return parse(content)
    except BadFile:
        raise
    except RecursionError as error:
        raise BadFile(f"is nested too deeply for {language}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise BadFile(f"is not UTF-8 text ({error.reason})", where=str(path)) from error
    except Exception as error:
        said = first_line(error, 200)
        raise BadFile(f"is not valid {language}: {said}", where=str(path)) from error


def bad_file(error: OSError, path: Path) -> BadFile:
    """What an error of the system means for whoever wanted to read ``path``."""
    # It was not there when it was asked for. That something is now only says that it has come meanwhile,
    # unless it is a link that leads nowhere.
    absent = error.errno == errno.ENOENT and not os.path.islink(path)
    if absent or (error.errno == errno.ENOTDIR and not os.path.lexists(path)):
        return NoFile("there is no such file", where=str(path))
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):
        return BadFile("is a link or lies behind one, and links are not followed here", where=str(path))
    return BadFile(f"cannot be read: {error.strerror or error}", where=str(path))
