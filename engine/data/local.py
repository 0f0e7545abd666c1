"""Text from files: .txt, .jsonl, .parquet and .arrow, compressed or not, or a folder of them.

A text file is one document, read as it is; a row of the other formats is one document. Validation is
the last tenth of the text, cut at a line; a source of more than 64 MiB is too long to be measured first,
so there the documents themselves decide by what they say. A folder whose files or sub-folders are called
``train…``, ``validation…`` or ``test…`` brings its own parts. Evaluation reads the whole text.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from engine.data.text import VALIDATION_FRACTION, Part, held_out_bucket
from engine.run.errors import DataError

SMALL_CHARS = 64 << 20
"""Up to this much text is held in memory, split by position and identified by content."""
_PIECE_CHARS = 1 << 20
_COMPRESSIONS = (".gz", ".zst")
_FORMATS = (".txt", ".jsonl", ".parquet", ".arrow")
SUFFIXES = (*_FORMATS, *(kind + packed for kind in (".txt", ".jsonl") for packed in _COMPRESSIONS))
_SPLIT_NAMES: dict[Part, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "evaluation": ("test", "eval", "evaluation"),
}


class LocalText:
    """A file, or the files of a folder in the order of their paths."""

    streams = False

    def __init__(self, path: Path, *, column: str | None, split: str | None, corpus: str) -> None:
        self.path = path
        self.corpus = corpus
        self._column = column or "text"
        self._split = split
        self._files = _find_files(path)

    def documents(self, part: Part, seed: int = 0) -> Iterator[str]:
        files, own_part = self._files_of(part)
        if own_part:
            yield from self._read(files)
            return
        documents = self._read(files)
        head, small = _take(documents, SMALL_CHARS)
        if small:
            yield from _split_by_position(head, part)
            return
        if len(files) > 1:  # a long folder is read only in part: which part depends on the seed
            files = random.Random(seed).sample(files, len(files))
            head, documents = [], self._read(files)
        for text in itertools.chain(head, documents):
            if (held_out_bucket(text) < VALIDATION_FRACTION * 100) == (part == "validation"):
                yield text

    def identity(self, part: Part) -> dict[str, str]:
        files, own_part = self._files_of(part)
        rule = "whole" if own_part else f"{part} of a tenth held out"
        return {
            "kind": "local",
            "corpus": self.corpus,
            "path": str(self.path.resolve()),
            "column": self._column,
            "part": rule,
            "files": _fingerprint(files, self.path),
        }

    def _files_of(self, part: Part) -> tuple[list[Path], bool]:
        """The files to read, and whether they are the part itself (or a part must still be cut out)."""
        if self.path.is_file():
            return self._files, part == "evaluation"
        by_part = {name: self._named(words) for name, words in _SPLIT_NAMES.items()}
        if self._split and any(by_part.values()):
            aliases = next((words for words in _SPLIT_NAMES.values() if self._split in words), (self._split,))
            chosen = self._named(aliases)
            if not chosen:
                raise DataError(
                    f"the folder has no files of split {self._split!r}",
                    where=str(self.path),
                    hint="the name of a file or sub-folder starts with its split",
                )
            return chosen, part == "evaluation"
        if by_part[part] and (part != "train" or by_part["validation"]):
            return by_part[part], True
        if part == "evaluation":
            return by_part["validation"] or by_part["train"] or self._files, True
        return by_part["train"] or self._files, False

    def _named(self, words: Iterable[str]) -> list[Path]:
        pattern = re.compile(rf"^({'|'.join(map(re.escape, words))})([-_. ]|$)", re.IGNORECASE)
        return [
            file
            for file in self._files
            if any(pattern.match(component) for component in file.relative_to(self.path).parts)
        ]

    def _read(self, files: Iterable[Path]) -> Iterator[str]:
        """Every document of the files; a source without a single character is an error."""
        anything = False
        for file in files:
            for text in _read_file(file, self._column):
                if text.strip():
                    anything = True
                    yield text
        if not anything:
            raise DataError("there is no text in it", where=str(self.path), hint="use another file or column")


def _find_files(path: Path) -> list[Path]:
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(
                "unknown kind of text file", where=str(path), hint=f"readable are {', '.join(SUFFIXES)}"
            )
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.name.endswith(SUFFIXES)
        and file.is_file()
        # hidden folders are version control and caches; cache-*.arrow is what `datasets` leaves behind
        and not any(component.startswith((".", "cache-")) for component in file.relative_to(path).parts)
    ]
    if not files:
        raise DataError(
            "no text files in this folder", where=str(path), hint=f"readable are {', '.join(SUFFIXES)}"
        )
    return files


def _take(documents: Iterator[str], limit: int) -> tuple[list[str], bool]:
    """Documents up to ``limit`` characters, and whether these are all."""
    taken: list[str] = []
    characters = 0
    for text in documents:
        taken.append(text)
        characters += len(text)
        if characters > limit:
            return taken, False
    return taken, True


def _split_by_position(documents: list[str], part: Part) -> Iterator[str]:
    """The head of the text, or its held-out tail; the document at the border is cut at a line or word."""
    border = round(sum(map(len, documents)) * (1 - VALIDATION_FRACTION))
    start = 0
    for text in documents:
        cut = border - start
        start += len(text)
        if 0 < cut < len(text):
            cut = max(text.rfind("\n", 0, cut), 0) or max(text.rfind(" ", 0, cut), 0) or cut
        piece = text[: max(cut, 0)] if part == "train" else text[max(cut, 0) :]
        if piece.strip():
            yield piece


def _fingerprint(files: list[Path], root: Path) -> str:
    """Content hash of a small source; path, size and modification time of a large one."""
    sizes = [file.stat() for file in files]
    small = sum(size.st_size for size in sizes) <= SMALL_CHARS
    digest = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        digest.update(f"{file.name if file == root else file.relative_to(root)}\0{size.st_size}\0".encode())
        digest.update(file.read_bytes() if small else str(size.st_mtime_ns).encode())
    return ("sha256:" if small else "stat:") + digest.hexdigest()


def _read_file(path: Path, column: str) -> Iterator[str]:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    try:
        if name.endswith(".txt"):
            yield from _read_text(path)
        elif name.endswith(".jsonl"):
            yield from _read_jsonl(path, column)
        else:
            yield from _read_columnar(path, column)
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text ({error.reason})", where=str(path), hint="convert the file to UTF-8"
        ) from None
    except (OSError, EOFError) as error:  # unreadable, or a compressed file that ends too early
        raise DataError(f"cannot be read: {error}", where=str(path)) from None


def _open_text(path: Path) -> IO[str]:
    if path.name.endswith(".zst"):
        import pyarrow

        stream = pyarrow.input_stream(str(path), compression="zstd")
        return io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8", newline="")
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _read_text(path: Path) -> Iterator[str]:
    """The file as one document; one that would not fit comfortably in memory, as pieces of whole lines."""
    with _open_text(path) as file:
        text = file.read(SMALL_CHARS + 1)
        if len(text) <= SMALL_CHARS:
            yield text
            return
        while text:
            while len(text) > _PIECE_CHARS:
                cut = text.rfind("\n", 0, _PIECE_CHARS) + 1 or _PIECE_CHARS
                yield text[:cut]
                text = text[cut:]
            more = file.read(_PIECE_CHARS)
            if not more:
                yield text
                return
            text += more


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"not a JSON line ({error.msg})", where=where) from None
            if not isinstance(row, dict):
                raise DataError("the line is not a JSON object", where=where)
            if column not in row:
                raise missing_column(column, row, where)
            text = checked_text(row[column], column, where)
            if text is not None:
                yield text


def _read_columnar(path: Path, column: str) -> Iterator[str]:
    import pyarrow

    try:
        for batch in _record_batches(path, column):
            for value in batch.column(batch.schema.get_field_index(column)).to_pylist():
                text = checked_text(value, column, str(path))
                if text is not None:
                    yield text
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot be read: {str(error).splitlines()[0]}", where=str(path)) from None


def _record_batches(path: Path, column: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    if path.name.endswith(".parquet"):
        with pyarrow.parquet.ParquetFile(path) as table:
            if column not in table.schema_arrow.names:
                raise missing_column(column, table.schema_arrow.names, str(path))
            yield from table.iter_batches(batch_size=1024, columns=[column])
        return
    with pyarrow.memory_map(str(path)) as mapped:
        try:  # `datasets` writes the stream format, most others the file format
            reader = pyarrow.ipc.open_stream(mapped)
            batches: Iterable[Any] = reader
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            reader = pyarrow.ipc.open_file(mapped)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        if column not in reader.schema.names:
            raise missing_column(column, reader.schema.names, str(path))
        yield from batches


def missing_column(column: str, available: Iterable[str], where: str) -> DataError:
    """The error for a column that is not there: says which ones are."""
    names = ", ".join(map(str, available))
    return DataError(f"no column {column!r}", where=where, hint=f"set data.column to one of: {names}")


def checked_text(value: object, column: str, where: str) -> str | None:
    """A row's text; an empty cell is skipped, anything but a string is an error."""
    if value is None or isinstance(value, str):
        return value
    raise DataError(
        f"column {column!r} holds {type(value).__name__}, not text", where=where, hint="set data.column"
    )
