"""A file of the user's that is read more than once is the same file every time.

A model or a text is judged, hashed and named once, and read for hours afterwards. If somebody replaces or
rewrites a file meanwhile, the result would be a mixture of two models that calls itself verified. So what
tells one file from another is noted when it is first looked at (:class:`StampedFile`), and every later
reading compares it, before and after, on the very descriptor that is read.

Between processes a file is known by its content instead (``ModelSource.identity``): a copy that was put back
has another inode and time, and is as good as the original.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from engine.errors import IdentityError
from engine.system.guarded import LARGE, BadFile, bad_file, kind_of, open_regular, require_regular


class Stamp(msgspec.Struct, frozen=True):
    """What tells one state of a file from any other, as the system keeps it."""

    device: int
    inode: int
    size: int
    """Bytes."""
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class StampedFile(msgspec.Struct, frozen=True):
    """A regular file as it was when it was first looked at; links to it were followed then."""

    path: Path
    stamp: Stamp

    @classmethod
    def of(cls, path: Path) -> StampedFile:
        """The file as it is now; nothing is opened, so nothing can hang.

        Raises:
            NoFile: where there is none.
            BadFile: for anything but a regular file.
        """
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:
            raise _unusable(error, path) from error
        require_regular(status, path)
        return cls(path, Stamp.of(status))

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stamp.size

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file for reading, compared before and after; also where the reading failed, since half a
        file that is being replaced looks like a damaged one.

        Raises:
            IdentityError: when it is no longer the file that it was.
            BadFile: when the system does not let it be read.
        """
        try:
            descriptor = open_regular(self.path, follow=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._changed("is gone") from error
        except OSError as error:
            raise bad_file(error, self.path) from error
        except BadFile as error:
            raise self._changed(error.message) from error
        try:
            self._compare(os.fstat(descriptor))
            # What unpacks a file closes it as well; the descriptor is still needed then.
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                try:
                    yield file
                except Exception:
                    self._compare(os.fstat(descriptor))
                    raise
            self._compare(os.fstat(descriptor))
        finally:
            os.close(descriptor)

    def read(self, limit: int = LARGE) -> bytes:
        """The whole content.

        Raises:
            IdentityError: as :meth:`opened`.
            BadFile: for more than ``limit`` bytes, or when it cannot be read.
        """
        if self.size > limit:
            raise BadFile(f"is larger than the {limit} bytes that such a file can have", where=str(self.path))
        with self.opened() as file:
            try:
                return file.read(limit + 1)
            except OSError as error:
                raise bad_file(error, self.path) from error

    def check(self) -> None:
        """IdentityError where another file is there now; for what libraries read by name."""
        try:
            self._compare(os.stat(self.path))
        except FileNotFoundError as error:
            raise self._changed("is gone") from error
        except OSError as error:
            raise bad_file(error, self.path) from error

    def _compare(self, status: os.stat_result) -> None:
        if Stamp.of(status) != self.stamp:
            raise self._changed("has changed")

    def _changed(self, how: str) -> IdentityError:
        return IdentityError(
            f"{how} since this run began to read it",
            where=str(self.path),
            hint="put the file back as it was and resume the run, or start a new run with the new one",
        )


def _unusable(error: OSError | ValueError, path: Path) -> BadFile:
    """Why a file cannot be looked at; a link that leads nowhere is told from a file that is not there."""
    if isinstance(error, ValueError):
        return BadFile("is no name of a file", where=str(path))
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return BadFile(
            "is a link to nothing", where=str(path), hint="put the file there, or finish its download"
        )
    return bad_file(error, path)


def refuse_odd(path: Path) -> None:
    """BadFile for a FIFO, a socket or a device, whose reading might never end; nothing is opened."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unusable(error, path) from error
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise BadFile(f"is {kind_of(status.st_mode)}, neither a file nor a folder", where=str(path))
