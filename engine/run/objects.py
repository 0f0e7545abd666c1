"""A checkpoint's objects: files that are named after the SHA-256 of their content and never changed.

They are large, so they are hashed in pieces and shared between runs instead of copied. Nothing is reached
through a link, and what is not a regular file is no object: a link may lead to somebody's model, and a FIFO
would never end.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from engine.errors import PreflightError
from engine.run import contents
from engine.system.files import atomic_write
from engine.system.guarded import BadFile, bad_file, names_in, open_regular, opened_folder
from engine.system.temporary import temporary_name, unique

_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What keeps a whole file from being read now; taking it for damage would train its blocks again."""


class DamagedCheckpoint(Exception):
    """A part of a checkpoint that cannot be used; the message says which file and why."""


def objects_path(directory: Path) -> Path:
    """The folder of the objects, below ``checkpoints/``."""
    return directory / "objects"


def object_path(directory: Path, digest: str) -> Path:
    """Where an object lies. A name that is no digest, from a file that was tampered with, is refused."""
    if not contents.DIGEST.fullmatch(digest):
        raise DamagedCheckpoint(f"{digest[:80]!r} is not the name of an object")
    return objects_path(directory) / f"{digest}.safetensors"


def object_damage(directory: Path, digest: str) -> str:
    """Why an object cannot be used; empty for one that is there and whole.

    Raises:
        PreflightError: where it cannot be read for a reason that says nothing about it (no access).
    """
    try:
        with _opened(directory, digest) as file:
            _require_content(file, digest)
    except DamagedCheckpoint as damage:
        return str(damage)
    return ""


def read_object(directory: Path, digest: str) -> bytes:
    """The content of an object, checked.

    Raises:
        DamagedCheckpoint: for one that is missing or not what its name says.
        PreflightError: as :func:`object_damage`.
    """
    with _opened(directory, digest) as file:
        content = file.read()
    _require(hashlib.sha256(content).hexdigest(), digest)
    return content


@contextmanager
def _opened(directory: Path, digest: str) -> Iterator[BufferedReader]:
    """An object's file, open for reading; what goes wrong with it is damage, but for want of access."""
    path = object_path(directory, digest)
    try:
        with os.fdopen(open_regular(path, root=directory.parent), "rb") as file:
            yield file
    except BadFile as error:
        raise DamagedCheckpoint(f"{path.name} {error.message}") from error
    except OSError as error:
        if error.errno in _NOT_DAMAGE:
            raise bad_file(error, path) from error
        raise DamagedCheckpoint(f"{path.name}: {bad_file(error, path).message}") from error


def _require_content(file: BufferedReader, digest: str) -> None:
    _require(hashlib.file_digest(file, "sha256").hexdigest(), digest)


def _require(found: str, digest: str) -> None:
    if found != digest:
        raise DamagedCheckpoint(f"{digest}.safetensors: its checksum does not match")


def share_object(source: Path, target: Path, digest: str) -> bool:
    """Make an object of the checkpoints ``source`` one of ``target`` too, as a hard link; False where the
    file system has none and the content has to be copied.

    Whatever the link turns out to be is checked before it gets the object's name, since the file may have
    been exchanged since somebody looked at it.

    Raises:
        DamagedCheckpoint: when it is not what its name says.
        OSError: what stands in the way of the link.
    """
    name = object_path(source, digest).name
    new = temporary_name(name)
    with (
        opened_folder(objects_path(source), source.parent) as there,
        opened_folder(objects_path(target), target.parent) as here,
    ):
        try:
            os.link(name, new, src_dir_fd=there, dst_dir_fd=here, follow_symlinks=False)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{name}: there is no such file") from error
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                return False
            raise
        try:
            _check_link(objects_path(target) / new, target.parent, digest)
            os.replace(new, name, src_dir_fd=here, dst_dir_fd=here)
            os.fsync(here)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=here)
            raise
    return True


def _check_link(path: Path, root: Path, digest: str) -> None:
    try:
        with os.fdopen(open_regular(path, root=root), "rb") as file:
            _require_content(file, digest)
    except BadFile as error:
        raise DamagedCheckpoint(f"{digest}.safetensors {error.message}") from error


def write_over(path: Path, data: bytes | Iterable[bytes | memoryview], root: Path) -> None:
    """:func:`engine.system.files.atomic_write`, also where a folder has the name: it is set aside under
    another one, since no file can replace it."""
    with contextlib.suppress(OSError), opened_folder(path.parent, root) as folder:
        if stat.S_ISDIR(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
            aside = f"{path.name}.aside-{unique(4)}"
            os.rename(path.name, aside, src_dir_fd=folder, dst_dir_fd=folder)
    atomic_write(path, data, root=root)


def checkpoint_files(folder: Path, root: Path) -> list[str]:
    """What lies in a folder of checkpoints, but for links, which are not ours; nothing where there is none.

    Raises:
        PreflightError: for a link, and where it cannot be looked into.
    """
    try:
        return names_in(folder, root)
    except FileNotFoundError:
        return []
    except OSError as error:
        what = (
            "is a link or a file where a folder should be"
            if error.errno in (errno.ELOOP, errno.ENOTDIR)
            else f"cannot be read: {error.strerror}"
        )
        raise PreflightError(what, where=str(folder)) from error
