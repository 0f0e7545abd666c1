"""The bytes of a log, which may be anything: whole lines from a place on, or the end of it.

A log grows for days and is read in pieces, so that a reader needs memory for what it keeps and not for the
file. A line that is longer than any of ours, and a hole that a file system left in it, are passed over.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from engine.system.guarded import BadFile, open_regular

PIECE = 32 << 20
LONGEST_LINE = 16 << 20
"""Far more than any event; a piece of a log without a newline in it is no event."""
MOST = 8 << 30
"""Bytes of a log: four a second for a month are less."""


def whole_lines(path: Path, offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """Pieces of complete lines from byte ``offset`` on, each with the offset behind it.

    Behind the last newline a line is still being written; it comes with the next call.

    Raises:
        OSError: where there is no such file, or it cannot be read.
        BadFile: for what is no regular file, or no log for its size.
    """
    fd = open_regular(path)
    with os.fdopen(fd, "rb", buffering=0) as log:
        size = os.fstat(fd).st_size
        rest, end = b"", offset
        while end < size:
            data = _next_data(fd, end, size)
            if data > end:  # a hole: whatever line it lies in is none
                rest, offset, end = b"", data, data
                continue
            if end - offset > MOST:
                raise BadFile("is too large for a log of a run", where=str(path))
            log.seek(end)
            piece = log.read(min(PIECE, size - end))
            if not piece:
                break
            end += len(piece)
            lines, newline, rest = (rest + piece).rpartition(b"\n")
            if newline:
                yield lines + newline, end - len(rest)
            elif len(rest) > LONGEST_LINE:
                yield b"", end
                rest = b""


def tail(path: Path, size: int) -> tuple[bytes, bool]:
    """The last ``size`` bytes of the file, and whether that is all of it; raises as :func:`whole_lines`."""
    fd = open_regular(path)
    with os.fdopen(fd, "rb", buffering=0) as log:
        end = log.seek(0, os.SEEK_END)
        log.seek(max(0, end - size))
        return log.read(size), size >= end


def head(path: Path, size: int, offset: int = 0) -> bytes:
    """At most ``size`` bytes from ``offset`` on; raises as :func:`whole_lines`."""
    with os.fdopen(open_regular(path), "rb", buffering=0) as log:
        log.seek(offset)
        return log.read(size)


def _next_data(fd: int, offset: int, size: int) -> int:
    """``offset``, or where the hole that it lies in ends."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else offset  # others: a file system that does not say
