"""Whose folders are these? Asked before anything is written into a run.

A run may come from somewhere: unpacked, copied, left by another account. A folder of it that is a link would
have logs written, checkpoints pruned and requests answered in another place, and one that belongs to somebody
else can be exchanged while it is used. Reading needs no such trust (:mod:`engine.system.guarded`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from engine.errors import PreflightError
from engine.system.guarded import kind_of, opened_folder
from engine.system.temporary import temporary_name


def require_own_folders(run: Path, folders: Iterable[Path]) -> None:
    """PreflightError unless the run's directory, and each of its ``folders`` that is there, is a real folder
    of this user's."""
    for folder in (run, *folders):
        try:
            status = os.lstat(folder)
        except FileNotFoundError:
            continue  # made again when it is needed
        except OSError as error:
            raise PreflightError(f"cannot be looked at: {error.strerror}", where=str(folder)) from error
        if not stat.S_ISDIR(status.st_mode):
            raise PreflightError(
                f"is {kind_of(status.st_mode)} where a run has a folder of its own",
                where=str(folder),
                hint="nothing is written through it; put the folder back, or start a new run",
            )
        if not is_ours(run, status.st_uid):
            owner = user_name(status.st_uid)
            raise PreflightError(
                f"belongs to {owner}, and runs are only worked on by the user they belong to",
                where=str(folder),
                hint=f"become {owner}, or copy the run: cp -r makes it yours",
            )


def is_ours(folder: Path, owner: int) -> bool:
    """Whether what ``owner`` owns, in ``folder`` or as that folder itself, belongs to this user.

    A file server may map all users to one: then ``owner`` is whoever gets what this user makes there.
    """
    return owner == os.geteuid() or _is_how_files_are_owned_here(folder, owner)


def _is_how_files_are_owned_here(folder: Path, owner: int) -> bool:
    """Whether the file system gives ``owner`` what this user makes."""
    name = temporary_name("owner")
    try:
        with opened_folder(folder) as place:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=place)
            try:
                return os.fstat(fd).st_uid == owner
            finally:
                os.close(fd)
                os.unlink(name, dir_fd=place)
    except OSError:
        return False


def user_name(number: int) -> str:
    """A user's name, or the number where there is none."""
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
