"""Removing files and folders that were judged before, and nothing else.

What is removed is named relative to a folder that is open: whatever happens to the path in the meantime, no
other folder is reached. A link is removed as a link; what it points to is not looked at.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from engine.errors import PreflightError
from engine.run import contents
from engine.run.proof import FolderIdentity, NotProven, shown
from engine.system.guarded import opened_folder

_TRIES = 100


def rename_proven(path: Path, name: str, identity: FolderIdentity) -> Path:
    """Give the folder ``path``, which was proven to be ``identity``, another name beside it.

    Raises:
        NotProven: where another folder has got its name; that one keeps it.
        OSError: what the system says.
    """
    with opened_folder(path.parent) as above:
        _require(above, path.name, identity, path)
        os.rename(path.name, name, src_dir_fd=above, dst_dir_fd=above)
        try:
            _require(above, name, identity, path)
        except NotProven:
            os.rename(name, path.name, src_dir_fd=above, dst_dir_fd=above)
            raise
    return path.with_name(name)


def remove_proven(path: Path, identity: FolderIdentity) -> None:
    """Delete a run's folder that was proven to be ``identity``.

    Its configuration, which proves whose it is, goes last, so that a deletion that is cut off can be told
    from a folder of the user's and be finished. What is no run's stays, and so does the folder then.

    Raises:
        PreflightError: where something cannot be deleted.
    """
    try:
        with opened_folder(path) as folder:
            if FolderIdentity.of(os.fstat(folder)) != identity:
                raise _exchanged(path)
            for name in os.listdir(folder):
                if contents.belongs_at_top(name) and name != contents.CONFIG:
                    remove_entry(folder, name)
            foreign = [name for name in os.listdir(folder) if not contents.belongs_at_top(name)]
            if foreign:
                raise PreflightError(
                    f"holds what no run has and appeared just now: {shown(foreign)}",
                    where=str(path),
                    hint="move it away, and eqat gc finishes the deletion",
                )
            remove_entry(folder, contents.CONFIG)
        os.rmdir(path)
    except FileNotFoundError:
        return  # somebody else finishes the same deletion
    except (OSError, RecursionError) as error:
        raise not_deleted(error, path) from error


def remove_entry(folder: int, name: str) -> None:
    """Delete a file, a link or a folder with what is in it from the folder with this descriptor."""
    for _ in range(_TRIES):
        try:
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                shutil.rmtree(name, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)
        except FileNotFoundError:  # somebody else deletes it too
            try:
                os.stat(name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                return
            continue
        return


def remove_file(folder: int, name: str, *, dry_run: bool = False) -> int:
    """Delete a regular file, if this is one, from the folder with this descriptor; the bytes that come free.

    A file that has another name, such as an object that another run shares, frees none.
    """
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            return 0
        if not dry_run:
            os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return 0
    return status.st_size if status.st_nlink == 1 else 0


def not_deleted(error: Exception, path: Path) -> PreflightError:
    """What an error while deleting means for the user."""
    if isinstance(error, RecursionError):
        return PreflightError("is nested too deeply to be deleted", where=str(path), hint="use rm -r")
    why = error.strerror or error if isinstance(error, OSError) else error
    return PreflightError(f"cannot be deleted: {why}", where=str(path))


def _require(above: int, name: str, identity: FolderIdentity, path: Path) -> None:
    if FolderIdentity.of(os.stat(name, dir_fd=above, follow_symlinks=False)) != identity:
        raise _exchanged(path)


def _exchanged(path: Path) -> NotProven:
    return NotProven("was exchanged for something else just now; nothing was deleted", where=str(path))
