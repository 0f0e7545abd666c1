"""Lines of a text file that somebody else made, and JSON objects of such lines.

Compressed files are read as a stream, and no line is longer than memory has room for: a few kilobytes can
stand for terabytes of blanks. Whatever a parser or a decompressor raises is one DataError with the file's
name, because a list of expected exceptions is never complete: nesting, numbers of 5000 digits and damaged
archives all have their own.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from engine.errors import DataError, EqatError, first_line
from engine.system.guarded import BadFile
from engine.system.stamps import StampedFile

LONGEST_LINE = 128 << 20
"""Characters; a book has a few millions."""


def stamped(path: Path, hint: str = "check data.source") -> StampedFile:
    """A text file as it is now.

    Raises:
        DataError: where there is no regular file.
    """
    try:
        return StampedFile.of(path)
    except BadFile as error:
        raise DataError(error.message, where=str(path), hint=hint) from error


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever is raised inside is a DataError that names ``path``; refusals that were made already and a
    full memory pass as they are, and so does the IdentityError of a file that changed."""
    try:
        yield
    except BadFile as error:
        raise DataError(error.message, where=str(path)) from error
    except (EqatError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text ({error.reason})", where=str(path), hint="convert the file to UTF-8"
        ) from error
    except Exception as error:
        said = first_line(error, 200)
        raise DataError(f"cannot be read: {said}", where=str(path)) from error


@contextlib.contextmanager
def open_text(file: StampedFile, encoding: str = "utf-8") -> Iterator[IO[str]]:
    """The file as text, unpacked if it is compressed; line ends stay as they are."""
    name = file.path.name
    with file.opened() as stream:
        unpacked: Any = stream
        if name.endswith(".zst"):
            import pyarrow

            unpacked = io.BufferedReader(pyarrow.input_stream(stream, compression="zstd"))
        elif name.endswith(".gz"):
            unpacked = gzip.GzipFile(fileobj=stream)
        with io.TextIOWrapper(unpacked, encoding=encoding, newline="") as text:
            yield text


def json_rows(file: StampedFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of every line that is not blank.

    Raises:
        DataError: naming file and line, where one is no JSON object.
        IdentityError: when the file is no longer the one that was stamped.
    """
    # Editors on Windows begin UTF-8 files with a mark.
    with readable(file.path), open_text(file, "utf-8-sig") as text:
        number = 0
        while line := text.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{file.path}:{number}"
            if len(line) > LONGEST_LINE:
                raise DataError(f"the line has more than {LONGEST_LINE:,} characters", where=where)
            if line.strip():
                yield number, _row(line, where)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not a JSON line ({error.msg})", where=where) from None
    except RecursionError:
        raise DataError("not a JSON line that can be read (it is nested too deeply)", where=where) from None
    except Exception as error:  # a number of more digits than Python reads
        raise DataError(f"not a JSON line that can be read ({first_line(error, 100)})", where=where) from None
    if not isinstance(row, dict):
        raise DataError("the line is not a JSON object", where=where)
    return row


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON can name halves of characters, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
