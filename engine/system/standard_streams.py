"""Standard input, output and error of a process, whatever state it was given them in.

Called first thing in ``main``. A descriptor that is closed (``2>&-``, some daemons and schedulers) is the
next one that any file gets: a lock or a log would then be written into by every message. An encoding without
our signs, a full disk and a terminal that has gone must not end with a traceback, and what is only told to a
person watching must not end anything at all.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EqatError
from engine.system.ascii import SIGNS
from engine.system.files import disk_error
from engine.system.printable import escaped

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_ERRORS = "eqat.signs"


class OutputError(EqatError):
    """What was to go to standard output cannot be written."""


def open_standard_streams() -> None:
    """Make the three standard streams usable.

    - Closed descriptors are opened on ``/dev/null``, and streams that are ``None`` stand for them.
    - A letter that the encoding of output or error lacks becomes ASCII (``→`` is ``->``, others ``\\u4e2d``).
    - A failed write to output is one :class:`OutputError`, to error it is passed over; both once.

    Streams that are something else already (a test's, another program's that called us) are left alone.
    """
    codecs.register_error(_ERRORS, _in_ascii)
    for fd in (0, 1, 2):
        _open(fd)
    stdin: Any = sys.stdin
    if stdin is None:
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    elif isinstance(stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # somebody has read from it already
            stdin.reconfigure(errors="replace")  # an answer that is no text is no answer, and no traceback
    sys.stdout = _writer(sys.stdout, 1)
    sys.stderr = _writer(sys.stderr, 2)


def finish_output() -> None:
    """Write what is still held back; :class:`OutputError` where that fails. Python itself would do it after
    the last chance to say so, and end with 120."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _open(fd: int) -> None:
    try:
        os.fstat(fd)
    except OSError as error:
        if error.errno != errno.EBADF:
            return
        # The lowest free descriptor is the one that is missing, since those before it are open by now.
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _writer(stream: Any, fd: int) -> Any:
    """``stream`` with other errors; itself, unless it is Python's own on ``fd``."""
    if stream is not None:
        try:
            if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != fd:
                return stream
            if isinstance(stream.buffer, io.BufferedWriter) and isinstance(stream.buffer.raw, _Descriptor):
                return stream  # a second call
            stream.flush()
        except (OSError, ValueError):
            pass
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(fd)),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors=_ERRORS,
        line_buffering=fd == 2 or (stream is not None and stream.line_buffering),
        write_through=stream is not None and stream.write_through,
    )


class _Descriptor(io.FileIO):
    """Output or error as bytes."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self._broken = False

    def write(self, data: ReadableBuffer, /) -> int:
        """One complaint is enough; whatever is flushed after it, at the latest by Python's end, is lost."""
        size = memoryview(data).nbytes
        if self._broken:
            return size
        try:
            while (written := super().write(data)) is None:  # another program made the terminal non-blocking
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            self._broken = True
            if self.fileno() == 2:
                return size
            cause = disk_error(error, Path("standard output"))
            raise OutputError(
                cause.message,
                exit_code=cause.exit_code,
                where=cause.where,
                hint="what was printed is cut off",
            ) from error


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """For :func:`codecs.register_error`: what an encoding lacks, in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(SIGNS.get(ord(letter)) or escaped(letter) for letter in letters), error.end
