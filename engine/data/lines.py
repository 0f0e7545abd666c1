"""Lines of a text file that somebody else made, and JSON objects of such lines.

Compressed files are read as a stream, and no line is longer than memory has room for: a few kilobytes can
stand for terabytes of blanks. Whatever a parser or a decompressor raises is one DataError with the file's
name, because a list of expected exceptions is never complete. A row that is valid JSON and beyond Python's
parser, nested ten thousand levels deep, is a row and not an error of the file; a number of 5000 digits is
infinite.

Text is UTF-8. A file of another encoding is refused by its name: UTF-16 without a mark would pass for UTF-8
with a zero after each letter. So is binary data, also where somebody has made UTF-8 of it.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from engine.errors import DataError, EqatError, first_line
from engine.system.guarded import BadFile
from engine.system.stamps import StampedFile

LONGEST_LINE = 128 << 20
"""Characters; a book has a few millions. The same for an array that is no line."""
TOO_DEEP = object()
"""In the place of a row that is nested too deeply for Python's parser."""

_HEAD = 4096
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # begins like UTF-16's
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_FORMATS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"%PDF": "PDF",
}
"""What files begin with that are no text, whatever they are called."""
_MOST_ZEROS = 0.3
"""Of a file's beginning, in a text; every second byte of English in UTF-16 is one."""
_CONTROLS = bytes({*range(32), 127} - set(b"\b\t\n\v\f\r\x1b"))
"""What is in no text; escapes colour the output of programs, and old manuals print bold by going back."""
_MOST_CONTROLS = 0.01
"""Of a piece of text. Of bytes drawn by lot every tenth is one, of the same made UTF-8 one in fifteen."""
_LONGEST_NUMBER = 4000
"""Digits; from 4300 on Python refuses to read a number."""


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
        byte = error.object[error.start]
        around = error.object[max(0, error.start - _HEAD) : error.start + _HEAD]
        if _is_binary(around):
            raise _binary(path) from error
        raise DataError(
            f"not UTF-8 text: it holds the byte 0x{byte:02x}, as Latin-1 and Windows-1252 have it "
            f"({error.reason})",
            where=str(path),
            hint="convert the file, for example: iconv -f WINDOWS-1252 -t UTF-8",
        ) from error
    except gzip.BadGzipFile as error:
        raise DataError(
            f"cannot be read: {first_line(error, 200)}",
            where=str(path),
            hint="give a file that is not compressed a name without .gz; download a damaged one again",
        ) from error
    except (EOFError, zlib.error) as error:
        raise DataError(
            f"cannot be read: {first_line(error, 200)}",
            where=str(path),
            hint="the compressed file is damaged or was cut off; download it again",
        ) from error
    except Exception as error:
        said = first_line(error, 200)
        raise DataError(f"cannot be read: {said}", where=str(path)) from error


@contextlib.contextmanager
def open_text(file: StampedFile) -> Iterator[IO[str]]:
    """The file as text, unpacked if it is compressed; line ends stay as they are, a mark at its beginning
    does not."""
    name = file.path.name
    with file.opened() as stream:
        unpacked: Any = stream
        if name.endswith(".zst"):
            import pyarrow

            unpacked = io.BufferedReader(pyarrow.input_stream(stream, compression="zstd"))
        elif name.endswith(".gz"):
            unpacked = gzip.GzipFile(fileobj=stream)
        refuse_encoding(unpacked.peek(_HEAD)[:_HEAD], file.path)
        # Editors on Windows begin UTF-8 files with a mark.
        with io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline="") as text:
            yield text


def refuse_encoding(head: bytes, path: Path) -> None:
    """DataError for a file that begins like text which is not UTF-8, or like no text."""
    kind = next((name for magic, name in _FORMATS.items() if head.startswith(magic)), None)
    if kind is not None:
        raise DataError(
            f"is a {kind} file and not the text that its name says",
            where=str(path),
            hint="unpack or convert it, or give it the name of what it is",
        )
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    zeros = head.count(0) > _MOST_ZEROS * len(head)
    if marked or (zeros and not _is_binary(head.replace(b"\0", b""))):
        raise DataError(
            f"is {marked} text, not UTF-8"
            if marked
            else "is UTF-16 text without a mark, not UTF-8, or no text: a third of it is zeros",
            where=str(path),
            hint=f"convert the file, for example: iconv -f {marked or 'UTF-16'} -t UTF-8",
        )
    if _is_binary(head):
        raise _binary(path)


def _is_binary(piece: bytes) -> bool:
    """Whether a piece of a file is no text in any encoding of a byte a letter, nor in UTF-8."""
    found = len(piece) - len(piece.translate(None, _CONTROLS))
    return found > max(2, _MOST_CONTROLS * len(piece))


def _binary(path: Path) -> DataError:
    return DataError(
        "is binary data and no text: it is full of control characters",
        where=str(path),
        hint="use a file of text; if it is UTF-16 in truth, convert it: iconv -f UTF-16LE -t UTF-8",
    )


def json_rows(file: StampedFile) -> Iterator[tuple[int, Any]]:
    """Number and content of every row: of every line that is not blank, or of every entry of a file that is
    one JSON array. What has no room in Python's parser is :data:`TOO_DEEP`.

    Raises:
        DataError: naming file and line, where one is not JSON.
        IdentityError: when the file is no longer the one that was stamped.
    """
    with readable(file.path), open_text(file) as text:
        line = _line(text, 1, file.path)
        number = 1
        while line and not line.strip():
            number += 1
            line = _line(text, number, file.path)
        if line.lstrip().startswith("["):
            whole = _array(line, text, file.path)
            if isinstance(whole, list):
                yield from enumerate(whole, 1)
                return
            text, line = whole, _line(whole, number, file.path)
        while line:
            if line.strip():
                yield number, _parsed(line, f"{file.path}:{number}")
            number += 1
            line = _line(text, number, file.path)


def _line(text: IO[str], number: int, path: Path) -> str:
    line = text.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise DataError(f"the line has more than {LONGEST_LINE:,} characters", where=f"{path}:{number}")
    return line.lstrip("\ufeff")  # where files with a mark were put one behind the other


def _array(line: str, rest: IO[str], path: Path) -> list[Any] | IO[str]:
    """The entries of a file that is one array; the same text again where it is lines of arrays."""
    whole = line + rest.read(LONGEST_LINE + 1 - len(line))
    if len(whole) > LONGEST_LINE:
        raise DataError(
            f"the array has more than {LONGEST_LINE:,} characters", where=str(path), hint="write a row a line"
        )
    try:
        found = _JSON.decode(whole)
    except RecursionError:
        found = [TOO_DEEP]
    except ValueError as error:
        if "\n" in whole.strip() and "Extra data" in str(error):
            return io.StringIO(whole)
        raise DataError(f"not JSON ({first_line(error, 200)})", where=f"{path}:1") from None
    assert isinstance(found, list)  # it begins with a bracket
    return found


def _parsed(line: str, where: str) -> Any:
    try:
        return _JSON.decode(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not a JSON line ({error.msg})",
            where=where,
            hint="rows are one JSON object a line, or the file is one array of them",
        ) from None
    except RecursionError:
        return TOO_DEEP


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else math.inf


_JSON = json.JSONDecoder(parse_int=_whole_number)


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON can name halves of characters, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
