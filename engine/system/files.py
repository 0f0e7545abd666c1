"""Writing a file so that a reader, or the next start after a power cut, sees the old or the new one whole."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import EqatError, ExitCode, PreflightError
from engine.system.guarded import BadFile, open_regular, opened_folder
from engine.system.temporary import temporary_name

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL = {
    errno.EDQUOT: "the disk is full: your quota of it is used up",
    errno.EFBIG: "the disk is full, or files may not become as large (ulimit -f)",
}
_NO_ACCESS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
)


def atomic_write(
    path: str | os.PathLike[str], data: bytes | Iterable[bytes | memoryview], *, root: Path | None = None
) -> None:
    """Replace ``path`` by ``data``, durably: new file in the same folder, fsync, rename, fsync the folder.

    ``data`` may come in pieces, so that what is large need not be in memory twice. Nothing from ``root`` (by
    default the file's own folder) down to the file is reached through a link: a folder that was exchanged for
    one is refused, and a link under the file's own name is replaced, not followed.

    Raises what :func:`disk_error` makes of an :class:`OSError`; the old file is untouched then.
    """
    path = Path(path)
    new = temporary_name(path.name)
    try:
        with opened_folder(path.parent, root) as folder:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with os.fdopen(os.open(new, flags, 0o644, dir_fd=folder), "wb") as file:
                    for piece in (data,) if isinstance(data, bytes) else data:
                        file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(new, path.name, src_dir_fd=folder, dst_dir_fd=folder)
                sync_folder(folder)
            except BaseException:
                _unlink(new, folder)
                raise
    except OSError as error:
        raise disk_error(error, path) from error


def _unlink(name: str, folder: int) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass


def atomic_write_json(
    path: str | os.PathLike[str], value: Mapping[str, Any] | msgspec.Struct, *, root: Path | None = None
) -> None:
    """:func:`atomic_write` of ``value`` as indented JSON; NaN and infinities become null."""
    atomic_write(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n", root=root)


def overwrite_in_place(path: Path, data: bytes) -> bool:
    """Put JSON where a small file is, if that takes no more room than it has; readers see all of it or none,
    since it is one write. Not durable."""
    try:
        fd = open_regular(path, os.O_WRONLY)
    except (OSError, BadFile):
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


def make_folder(folder: Path, *, root: Path | None = None, mode: int = 0o755) -> None:
    """Make ``folder`` where it is missing. What lies above it must be there: a run that was deleted is not
    made anew piece by piece.

    Raises:
        PreflightError: where something else has its name, a link above all.
    """
    try:
        with opened_folder(folder.parent, root if root != folder else None) as above:
            try:
                os.mkdir(folder.name, mode, dir_fd=above)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(folder.name, dir_fd=above, follow_symlinks=False).st_mode):
                    raise PreflightError(
                        "is a link or a file where a folder should be",
                        where=str(folder),
                        hint="remove it, and start again",
                    ) from None
    except OSError as error:
        raise disk_error(error, folder) from error


def existing(place: Path) -> Path:
    """``place``, or the nearest folder above it that exists already."""
    absolute = place.absolute()
    return next((path for path in (absolute, *absolute.parents) if os.path.exists(path)), Path("/"))


def sync_folder(folder: int) -> None:
    """Make a rename in a folder durable, where the file system can."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems
            raise


def full_disk(error: BaseException) -> int | None:
    """``ENOSPC``, ``EDQUOT`` or ``EFBIG`` where that is what stood in the way of ``error``; else none.

    Libraries written in Rust (tokenizers, safetensors) raise types of their own with the system's words; and
    what was raised because of a full disk may have been raised on as something else.
    """
    if isinstance(error, EqatError) and error.exit_code != ExitCode.DISK_FULL:
        return None
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if number in _NO_SPACE:
            return number
        if number is None and not isinstance(cause, EqatError):
            for number in _NO_SPACE:
                if f"(os error {number})" in str(cause):
                    return number
            if os.strerror(errno.ENOSPC) in str(cause):
                return errno.ENOSPC
        cause = cause.__cause__
    return errno.ENOSPC if isinstance(error, EqatError) else None


def disk_error(error: OSError, path: Path) -> EqatError:
    """What a failed write means for the user: full disk (7), no access (3), or a fault of the disk (3)."""
    if error.errno in _NO_SPACE:
        return EqatError(
            _FULL.get(error.errno or 0, "the disk is full"),
            exit_code=ExitCode.DISK_FULL,
            where=str(path),
            hint="free some space and start it again; nothing that was committed is lost",
        )
    if error.errno == errno.ELOOP or (error.errno == errno.ENOTDIR and path.parent.is_symlink()):
        return PreflightError(
            "cannot be written: a link lies on the way, and nothing is written through it", where=str(path)
        )
    what = error.strerror or str(error)
    hint = "choose another place with --runs-dir" if error.errno in _NO_ACCESS else ""
    return PreflightError(f"cannot be written: {what}", where=str(path), hint=hint)


def is_virtual(folder: Path) -> bool:
    """A place that says it can be written and holds no files, such as /proc."""
    try:
        return shutil.disk_usage(folder).total == 0
    except OSError:
        return True
