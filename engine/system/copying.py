"""Copying an export to a folder of the user's, whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from engine.errors import EqatError, UsageError
from engine.system.files import disk_error, is_virtual, sync_folder
from engine.system.guarded import opened_folder, opened_inner, require_regular
from engine.system.temporary import unique

ANOTHER = "choose another folder"
PIECE_BYTES = 16 << 20


def check_target(folder: Path, run: Path | None = None) -> None:
    """UsageError unless ``folder`` can be made, or is empty: nothing of the user's is overwritten.

    It must not be a link, and not lie inside ``run``, whose export is to be copied.
    """
    try:
        mode = _mode(folder)
        if mode is not None and stat.S_ISLNK(mode):
            raise UsageError("is a link; name the folder itself", where=str(folder), hint=ANOTHER)
        if mode is not None and not (stat.S_ISDIR(mode) and not any(folder.iterdir())):
            raise UsageError("exists and is not an empty folder", where=str(folder), hint=ANOTHER)
        if run is not None and folder.resolve().is_relative_to(run.resolve()):
            raise UsageError("lies inside the run itself", where=str(folder), hint=ANOTHER)
        # Folders above it that are missing are made.
        above = next(place for place in folder.absolute().parents if os.path.lexists(place))
        writable = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:  # ValueError for a name with a zero byte
        what = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot be read: {what}", where=str(folder), hint=ANOTHER) from error
    if not writable or is_virtual(above):
        raise UsageError(f"cannot be made in {above}", where=str(folder), hint=ANOTHER)


def _mode(folder: Path) -> int | None:
    try:
        return os.lstat(folder).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def copy_whole(export: Path, folder: Path, *, run: Path, poll: Callable[[], None] = lambda: None) -> None:
    """Copy ``export``, a folder inside ``run``, to ``folder``, which appears only when it is complete.

    ``poll`` is called between two pieces and may raise. Whatever is raised, nothing is left behind.

    Raises:
        UsageError: what :func:`check_target` says.
        EqatError: for a full disk or one that cannot be written.
    """
    check_target(folder, run)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error
    partial = f".eqat-{unique(8)}.partial"  # not longer than any name that the user chose may be
    try:
        with opened_folder(export, run) as source, opened_folder(folder.parent.resolve()) as above:
            try:
                os.mkdir(partial, 0o755, dir_fd=above)
                with opened_inner(partial, above) as made:
                    _copy_folder(source, made, export, poll)
                # An empty folder gives way to the new one; anything else that came meanwhile does not.
                os.rename(partial, folder.name, src_dir_fd=above, dst_dir_fd=above)
                sync_folder(above)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True, dir_fd=above)
                raise
    except OSError as error:
        failure = disk_error(error, folder)
        raise EqatError(
            failure.message, exit_code=failure.exit_code, where=failure.where, hint=ANOTHER
        ) from error


def _copy_folder(source: int, target: int, where: Path, poll: Callable[[], None]) -> None:
    """Every file and folder of one opened folder into another; ``where`` names the first in messages."""
    for name in sorted(os.listdir(source)):
        if stat.S_ISDIR(os.stat(name, dir_fd=source, follow_symlinks=False).st_mode):
            os.mkdir(name, 0o755, dir_fd=target)
            with opened_inner(name, source) as inner, opened_inner(name, target) as made:
                _copy_folder(inner, made, where / name, poll)
        else:
            _copy_file(name, source, target, where / name, poll)
    sync_folder(target)


def _copy_file(name: str, source: int, target: int, where: Path, poll: Callable[[], None]) -> None:
    read = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    write = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, read, dir_fd=source), "rb") as content:
        require_regular(os.fstat(content.fileno()), where)
        with os.fdopen(os.open(name, write, 0o644, dir_fd=target), "wb") as copy:
            while piece := content.read(PIECE_BYTES):
                copy.write(piece)
                poll()
            copy.flush()
            os.fsync(copy.fileno())
