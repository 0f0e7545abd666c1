"""Writing a file so that a reader, or the next start after a power cut, sees the old or the new one whole."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.run.errors import EqatError, ExitCode, PreflightError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
)


def atomic_write(path: str | os.PathLike[str], data: bytes | Iterable[bytes | memoryview]) -> None:
    """Replace ``path`` by ``data``, durably: new file in the same folder, fsync, rename, fsync the folder.

    ``data`` may come in pieces, so that what is large need not be in memory twice.

    Raises what :func:`disk_error` makes of an :class:`OSError`; the old file is untouched then.
    """
    path = Path(path)
    # The name is unique: two threads (or an engine and a command) may write the same file at once.
    new = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            with os.fdopen(fd, "wb") as file:
                for piece in (data,) if isinstance(data, bytes) else data:
                    file.write(piece)
                file.flush()
                os.fsync(fd)
            os.replace(new, path)
            sync_directory(path.parent)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise disk_error(error, path) from error


def atomic_write_json(path: str | os.PathLike[str], value: Mapping[str, Any] | msgspec.Struct) -> None:
    """:func:`atomic_write` of ``value`` as indented JSON; NaN and infinities become null."""
    atomic_write(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def overwrite_in_place(path: Path, data: bytes) -> bool:
    """Put JSON where a small file is, if that takes no more room than it has; readers see all of it or none,
    since it is one write. Not durable."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        there = os.fstat(fd)
        if len(data) > there.st_blocks * 512:
            return False
        return os.pwrite(fd, data.ljust(there.st_size), 0) >= len(data)
    except OSError:
        return False
    finally:
        os.close(fd)


def existing(place: Path) -> Path:
    """``place``, or the nearest folder above it that exists already."""
    absolute = place.absolute()
    return next((path for path in (absolute, *absolute.parents) if os.path.exists(path)), Path("/"))


def sync_directory(path: Path) -> None:
    """Make a rename in ``path`` durable, where the file system can."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems
            raise
    finally:
        os.close(fd)


def read_error(error: OSError, path: Path) -> PreflightError:
    """What a failed read means for the user: no access, or a fault of the disk (3)."""
    return PreflightError(f"cannot be read: {error.strerror or error}", where=str(path))


def disk_error(error: OSError, path: Path) -> EqatError:
    """What a failed write means for the user: full disk (7), no access (3), or a fault of the disk (3)."""
    if error.errno in _NO_SPACE:
        return EqatError(
            "the disk is full",
            exit_code=ExitCode.DISK_FULL,
            where=str(path),
            hint="free some space and start it again; nothing that was committed is lost",
        )
    what = error.strerror or str(error)
    hint = "choose another place with --runs-dir" if error.errno in _NO_ACCESS else ""
    return PreflightError(f"cannot be written: {what}", where=str(path), hint=hint)
