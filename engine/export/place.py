"""Where an export is made, and how it gets its name.

    <format>           the export: always a whole one that was verified
    <format>.partial   what is being written and verified
    <format>.old       the export before, while the file system cannot exchange two names at once
    <format>.failed    what was written and is not what was trained

The new export takes the name of the old one in a single step of the file system, so that a kill, at
whatever instant, leaves the one or the other under that name. Where a file system cannot exchange two names,
the old one steps aside first; a kill just then leaves ``.old`` without a successor, and
:meth:`ExportPlace.recover` gives it its name back.

What has one of these names when an export begins may have been put there by somebody else. It is removed as a
name, whatever it is, and never followed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import EqatError, PreflightError
from engine.run.contents import FAILED, OLD, PARTIAL
from engine.run.removal import remove_entry
from engine.system.files import disk_error, make_folder, sync_folder
from engine.system.guarded import open_inner, opened_folder, require_regular

_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""EPERM is what some containers answer to system calls that they do not know; where it is meant, the renames
that are tried instead are refused too."""


class ExportPlace:
    """The names of one export in ``folder.parent``, a folder below ``root`` that is reached without links."""

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        self.folder = folder
        self.root = folder.parent if root is None else root
        self.partial, self.old, self.failed = (
            folder.with_name(folder.name + suffix) for suffix in (PARTIAL, OLD, FAILED)
        )
        self._made: int | None = None
        """A descriptor of the folder that is being made: while it is open no other gets that inode."""

    def recover(self) -> None:
        """Mend what a kill left behind: an old export gets its name back, half a new one goes.

        Raises:
            PreflightError: where the folder is a link, or cannot be changed.
        """
        if not os.path.lexists(self.folder.parent):
            return
        with self._opened() as above:
            if _is_folder(self.old.name, above) and not _exists(self.folder.name, above):
                os.rename(self.old.name, self.folder.name, src_dir_fd=above, dst_dir_fd=above)
                sync_folder(above)
            remove_entry(above, self.old.name)
            remove_entry(above, self.partial.name)

    @contextmanager
    def being_made(self) -> Iterator[Path]:
        """An empty folder to write the new export into; what is left of it when the context ends is removed.

        Raises:
            EqatError: what :func:`~engine.system.files.disk_error` makes of every :class:`OSError` inside.
        """
        make_folder(self.folder.parent, root=self.root)
        self.recover()
        try:
            with self._opened() as above:
                os.mkdir(self.partial.name, 0o755, dir_fd=above)
                self._made = open_inner(self.partial.name, above)
            yield self.partial
        except OSError as error:
            raise disk_error(error, self.partial) from error
        finally:
            if self._made is not None:
                os.close(self._made)
                self._made = None
            with contextlib.suppress(EqatError), self._opened() as above:
                remove_entry(above, self.partial.name)

    def publish(self) -> None:
        """Give what was made the export's name; an older one is removed after that.

        Raises:
            EqatError: when that is not possible; the older one has its name then.
        """
        with self._opened() as above:
            self._require_ours(above)
            sync_content(self.partial.name, above)
            self._take_name(above)
            sync_folder(above)
            for name in (self.partial.name, self.old.name):
                with contextlib.suppress(OSError):  # the new export stands; the next one removes the old
                    remove_entry(above, name)

    def keep_as_failed(self) -> None:
        """What was made is not what was trained: it is kept to look at, and the older export stays."""
        with self._opened() as above:
            self._require_ours(above)
            remove_entry(above, self.failed.name)
            os.rename(self.partial.name, self.failed.name, src_dir_fd=above, dst_dir_fd=above)
            sync_folder(above)

    def _take_name(self, above: int) -> None:
        new, name, old = self.partial.name, self.folder.name, self.old.name
        if not _exists(name, above):
            os.rename(new, name, src_dir_fd=above, dst_dir_fd=above)
        elif not exchange(new, name, above):
            os.rename(name, old, src_dir_fd=above, dst_dir_fd=above)
            try:
                os.rename(new, name, src_dir_fd=above, dst_dir_fd=above)
            except BaseException:
                os.rename(old, name, src_dir_fd=above, dst_dir_fd=above)
                raise

    def _require_ours(self, above: int) -> None:
        """Only the folder that was written and verified gets the name, not one that was put in its place."""
        found = _status(self.partial.name, above)
        if self._made is None or found is None or not os.path.samestat(found, os.fstat(self._made)):
            raise PreflightError(
                "was removed or exchanged while it was being written",
                where=str(self.partial),
                hint="export the run again",
            )

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            with opened_folder(self.folder.parent, self.root) as above:
                yield above
        except OSError as error:
            raise disk_error(error, self.folder) from error


def exchange(one: str, other: str, folder: int) -> bool:
    """Exchange two names in an opened folder in one step; False where system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if rename(folder, os.fsencode(one), folder, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), other)


def sync_content(name: str, folder: int) -> None:
    """Wait until the disk has every file below ``name``; BadFile for what is neither a file nor a folder."""
    for inner, _, files, fd in os.fwalk(name, dir_fd=folder, follow_symlinks=False, onerror=_raise):
        for file in files:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            opened = os.open(file, flags, dir_fd=fd)
            try:
                require_regular(os.fstat(opened), Path(inner, file))
                os.fsync(opened)
            finally:
                os.close(opened)
        sync_folder(fd)


def _raise(error: OSError) -> None:
    raise error


def _exists(name: str, folder: int) -> bool:
    return _status(name, folder) is not None


def _is_folder(name: str, folder: int) -> bool:
    found = _status(name, folder)
    return found is not None and stat.S_ISDIR(found.st_mode)


def _status(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
