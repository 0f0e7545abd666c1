"""Text from files: .txt, .jsonl, .json, .parquet and .arrow, compressed or not, or a folder of them.

A text file is one document, read as it is; a row of the other formats is one document. Validation is
the last tenth of the text, cut at a line; a source of more than 64 MiB is too long to be measured first,
so there the documents themselves decide by what they say. A folder whose files or sub-folders are called
``train…``, ``validation…`` or ``test…`` brings its own parts. Evaluation reads the whole text.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from engine.config.corpora import JSON_SUFFIXES, SUFFIXES
from engine.data.columns import Rows, outer, without_column
from engine.data.lines import json_rows, open_text, readable, stamped
from engine.data.parts import VALIDATION_FRACTION, Part, held_out_bucket
from engine.errors import DataError
from engine.system.stamps import StampedFile

_READING = "2"
"""Raised when the same files give other documents; 1 took a mark at a file's beginning for text."""
SMALL_CHARS = 64 << 20
"""Up to this much text is held in memory, split by position and identified by content."""
_PIECE_CHARS = 1 << 20
SPLIT_NAMES: dict[Part, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "evaluation": ("test", "eval", "evaluation"),
}
"""What files of a part are called."""


class LocalText:
    """A file, or the files of a folder in the order of their paths.

    They are the same files from the first look at them to the last: a text that changes between being
    identified and being read raises IdentityError, so that tokens are never cached under another text's name.
    """

    streams = False

    def __init__(self, path: Path, *, column: str | None, split: str | None, corpus: str) -> None:
        self.path = path
        self.corpus = corpus
        self._column = column or "text"
        self._split = split
        self._rows = Rows(self._column)
        self.files = _find_files(path)
        self._fingerprints: dict[tuple[Path, ...], str] = {}

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
            "reading": _READING,
            "files": self.fingerprint(files),
        }

    def skipped(self) -> list[str]:
        return self._rows.words(self.corpus)

    def fingerprint(self, files: list[StampedFile]) -> str:
        """Equal for files that hold the same."""
        for file in files:
            file.check()
        names = tuple(file.path for file in files)
        if names not in self._fingerprints:
            with readable(self.path):
                self._fingerprints[names] = _fingerprint(files, self.path)
        return self._fingerprints[names]

    def _files_of(self, part: Part) -> tuple[list[StampedFile], bool]:
        """The files to read, and whether they are the part itself (or a part must still be cut out)."""
        if not self.path.is_dir():
            return self.files, part == "evaluation"
        by_part = {name: self.named(words) for name, words in SPLIT_NAMES.items()}
        if self._split and any(by_part.values()):
            aliases = next((words for words in SPLIT_NAMES.values() if self._split in words), (self._split,))
            chosen = self.named(aliases)
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
            return by_part["validation"] or by_part["train"] or self.files, True
        return by_part["train"] or self.files, False

    def named(self, words: Iterable[str]) -> list[StampedFile]:
        """The files whose name, or that of a folder they lie in, begins with one of the words."""
        pattern = re.compile(rf"^({'|'.join(map(re.escape, words))})([-_. ]|$)", re.IGNORECASE)
        return [
            file
            for file in self.files
            if any(pattern.match(component) for component in file.path.relative_to(self.path).parts)
        ]

    def _read(self, files: Iterable[StampedFile]) -> Iterator[str]:
        """Every document of the files; a source without a single character, or with rows most of which have
        no text, is an error."""
        anything = False
        self._rows = rows = Rows(self._column)
        for file in files:
            for text in _read_file(file, rows):
                if text.strip():
                    anything = True
                    yield text
        rows.refuse_most()
        if not anything:
            raise DataError("there is no text in it", where=str(self.path), hint="use another file or column")


def _find_files(path: Path) -> list[StampedFile]:
    """Links are followed, since data is often linked in, but to regular files only."""
    if not path.is_dir():
        found = stamped(path)
        if not path.name.endswith(SUFFIXES):
            raise DataError(
                "unknown kind of text file", where=str(path), hint=f"readable are {', '.join(SUFFIXES)}"
            )
        return [found]
    names = [
        file
        for file in sorted(path.rglob("*"))
        if file.name.endswith(SUFFIXES)
        and not os.path.isdir(file)
        # hidden folders are version control and caches; cache-*.arrow is what `datasets` leaves behind
        and not any(component.startswith((".", "cache-")) for component in file.relative_to(path).parts)
    ]
    # Beside files of text, .json files describe them.
    texts = [file for file in names if not file.name.endswith(JSON_SUFFIXES)]
    files = [stamped(file, "remove it from the folder") for file in texts or names]
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


def _fingerprint(files: list[StampedFile], root: Path) -> str:
    """Content hash of a small source; path, size and modification time of a large one."""
    small = sum(file.size for file in files) <= SMALL_CHARS
    digest = hashlib.sha256()
    for file in files:
        name = file.path.name if file.path == root else file.path.relative_to(root)
        digest.update(f"{name}\0{file.size}\0".encode(errors="surrogateescape"))
        digest.update(file.read(SMALL_CHARS) if small else str(file.stamp.mtime_ns).encode())
    return ("sha256:" if small else "stat:") + digest.hexdigest()


def _read_file(file: StampedFile, rows: Rows) -> Iterator[str]:
    name = file.path.name.removesuffix(".gz").removesuffix(".zst")
    with readable(file.path):
        if name.endswith(".txt"):
            yield from _read_text(file)
        elif name.endswith((".jsonl", ".json")):
            yield from _read_json(file, rows)
        else:
            yield from _read_columnar(file, rows)


def _read_text(source: StampedFile) -> Iterator[str]:
    """The file as one document; one that would not fit comfortably in memory, as pieces of whole lines."""
    with open_text(source) as file:
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


def _read_json(file: StampedFile, rows: Rows) -> Iterator[str]:
    for number, row in json_rows(file):
        text = rows.text(row, f"{file.path}:{number}")
        if text is not None:
            yield text


def whole_rows(file: StampedFile) -> Iterator[tuple[str, Any]]:
    """Where each row of a file is, and everything that it holds.

    Raises:
        DataError: for a file that cannot be read, or has no rows.
    """
    name = file.path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".txt"):
        raise DataError("is plain text, and has no rows", where=str(file.path), hint="name another file")
    with readable(file.path):
        if name.endswith((".jsonl", ".json")):
            for number, row in json_rows(file):
                yield f"{file.path}:{number}", row
            return
        with file.opened() as stream:
            number = 0
            for batch in _all_batches(file.path, stream):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.path}, row {number}", row


def _all_batches(path: Path, stream: BinaryIO) -> Iterator[Any]:
    """The file's batches with all of their columns."""
    import pyarrow
    import pyarrow.parquet

    if path.name.endswith(".parquet"):
        with pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True) as table:
            yield from table.iter_batches(batch_size=1024)
        return
    yield from _arrow_batches(stream)[1]


def _read_columnar(file: StampedFile, rows: Rows) -> Iterator[str]:
    number = 0
    # Read, not mapped: a file that somebody cuts off meanwhile ends a process that has it mapped.
    with file.opened() as stream:
        for name, batch in _record_batches(file.path, stream, rows):
            index = batch.schema.get_field_index(name)
            if index < 0:
                raise DataError(f"has several columns {name!r}", where=str(file.path), hint="rename them")
            for value in _values(batch.column(index)):
                number += 1
                text = rows.text({name: value}, f"{file.path}, row {number}")
                if text is not None:
                    yield text


def _values(column: Any) -> list[Any]:
    """The values of a column; text that is not UTF-8 as bytes, so that it costs its row and not the file."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        large = pyarrow.types.is_large_string(column.type)
        return column.cast(pyarrow.large_binary() if large else pyarrow.binary()).to_pylist()


def _record_batches(path: Path, stream: BinaryIO, rows: Rows) -> Iterator[tuple[str, Any]]:
    """The file's batches, and the name of the column that is, or that has in it, the wanted one."""
    import pyarrow
    import pyarrow.parquet

    if path.name.endswith(".parquet"):
        # Sums are looked at where the file has some.
        with pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True) as table:
            name = _outer(rows, table.schema_arrow, path)
            for batch in table.iter_batches(batch_size=1024, columns=[name]):
                yield name, batch
        return
    schema, batches = _arrow_batches(stream)
    name = _outer(rows, schema, path)
    for batch in batches:
        yield name, batch


def _arrow_batches(stream: BinaryIO) -> tuple[Any, Iterable[Any]]:
    """Schema and batches of an Arrow file in either of its two forms."""
    import pyarrow

    try:  # `datasets` writes the stream format, most others the file format
        reader = pyarrow.ipc.open_stream(stream)
        return reader.schema, reader
    except pyarrow.ArrowInvalid:
        stream.seek(0)
        reader = pyarrow.ipc.open_file(stream)
        return reader.schema, (reader.get_batch(index) for index in range(reader.num_record_batches))


def _outer(rows: Rows, schema: Any, path: Path) -> str:
    rows.beside = {field.name: _example(field.type) for field in schema}
    name = outer(rows.column, schema.names)
    if name is None:
        raise without_column(rows.column, rows.beside, str(path))
    return name


def _example(kind: Any) -> Any:
    """A value as a column of an Arrow type has it, by which the column is told from others."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(kind):
        return _example(kind.value_type)
    if types.is_struct(kind):
        return {field.name: _example(field.type) for field in kind}
    if types.is_list(kind) or types.is_large_list(kind):
        return [_example(kind.value_type)]
    if any(test(kind) for test in (types.is_string, types.is_large_string, types.is_binary)):
        return ""
    if types.is_integer(kind) or types.is_floating(kind):
        return 0
    return types.is_boolean(kind) or None
