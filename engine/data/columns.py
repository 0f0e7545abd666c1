"""The column of a row that holds its text, and how many rows have none.

A column may lie in a table: ``text.en`` is the column ``en`` of the tables in column ``text``, unless there
is a column of just that name. A row whose column is missing, null or holds anything but text is skipped; how
many were is told. Where it is most of them, the column is the wrong one, or the file: then it is refused,
with the columns that do hold text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from engine.data.lines import TOO_DEEP, is_text
from engine.errors import DataError

EARLY = 10_000
"""A text of which so many rows have been read, and most had no text, is not read further."""
_MOST_NAMES, _LONGEST_NAME, _DEEPEST = 20, 60, 3
_MISSING = object()
_CONVERSATION = "a conversation"
_ROLES = ({"role", "content"}, {"from", "value"})
"""What a turn of a conversation is made of, as the usual data sets write it."""


class Rows:
    """The texts of the rows of one source.

    ``uniform`` says that all rows have the same columns, so that one without the column speaks for all.
    """

    def __init__(self, column: str, *, uniform: bool = False) -> None:
        self.column = column
        self.read = 0
        self.skipped = 0
        self.beside: Mapping[str, Any] = {}
        """Examples of what the other columns hold, where rows come without them."""
        self._uniform = uniform
        self._first: tuple[str, str, Any] = ("", "", None)

    def text(self, row: Any, where: str) -> str | None:
        """A row's text; none where there is none, which is counted unless the text is there and empty.

        Raises:
            DataError: where it is clear that most rows have none.
        """
        self.read += 1
        value = _value(row, self.column)
        text, problem = _judged(value, row, self.column)
        if problem:
            if not self.skipped:
                whole = {**self.beside, **row} if isinstance(row, Mapping) else row
                self._first = (problem, where, whole)
            self.skipped += 1
            if (self._uniform and value is _MISSING) or self.read >= EARLY:
                self.refuse_most()
        return text

    def refuse_most(self) -> None:
        """DataError where more than half of the rows so far have no text."""
        if self.skipped * 2 <= self.read:
            return
        problem, where, row = self._first
        if self.skipped < self.read:
            problem = f"{self.skipped:,} of {self.read:,} rows have no text; the first: {problem}"
        raise DataError(problem, where=where, hint=_hint(row, self.column))

    def words(self, corpus: str) -> list[str]:
        """What is told of rows without text: one line, or none.

        Raises:
            DataError: as :meth:`refuse_most`.
        """
        self.refuse_most()
        if not self.skipped:
            return []
        problem, where, _ = self._first
        return [
            f"{corpus}: {self.skipped:,} of {self.read:,} rows had no text and were left out; "
            f"the first: {problem} ({where})"
        ]


def without_column(column: str, row: Mapping[str, Any], where: str) -> DataError:
    """The error for a column that no row can have; ``row`` is one, or an example of what is in each."""
    return DataError(f"no column {column!r}", where=where, hint=_hint(row, column))


def outer(column: str, names: Iterable[str]) -> str | None:
    """Which of a file's columns a column is, or lies in; none where there is no such."""
    known = set(names)
    parts = column.split(".")
    prefixes = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((name for name in prefixes if name in known), None)


def _value(row: Any, column: str) -> Any:
    """What a row has in a column; a name with points is looked for in tables."""
    while isinstance(row, Mapping):
        name = outer(column, row)
        if name is None:
            return _MISSING
        row = row[name]
        if name == column:
            return row
        column = column[len(name) + 1 :]
    return _MISSING if row is not None else None


def _judged(value: Any, row: Any, column: str) -> tuple[str | None, str]:
    """A value's text, and what is wrong with it."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None, f"column {column!r} holds bytes that are not UTF-8 text"
    if isinstance(value, str):
        if is_text(value):
            return value, ""
        return None, f"column {column!r} holds half a character (a lone surrogate)"
    if row is TOO_DEEP:
        return None, "the row is nested too deeply to be read"
    if not isinstance(row, Mapping):
        return None, "the line is not a JSON object"
    if value is _MISSING:
        return None, f"no column {column!r}"
    return None, f"column {column!r} holds {kind_of(value)}, not text"


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, Mapping)]
        if turns and any(roles <= set(turns[0]) for roles in _ROLES):
            return _CONVERSATION
        return "a list"
    words: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (type(None), "nothing (null)"),
        (bool, "true or false"),
        ((int, float), "a number"),
        (Mapping, "a table"),
        ((str, bytes), "text"),
    )
    return next((word for kind, word in words if isinstance(value, kind)), type(value).__name__)


def _hint(row: Any, column: str) -> str:
    """Which columns hold text; where none does, what they hold."""
    if not isinstance(row, Mapping):
        return "every row has to be an object with a column of text"
    texts = [name for name in _texts(row) if name != column]
    if texts:
        return f"set data.column to one of: {listed(texts)}"
    kinds = [
        f"{_shown(name)} ({kind_of(value)})" for name, value in itertools.islice(row.items(), _MOST_NAMES)
    ]
    if any(kind_of(value) == _CONVERSATION for value in row.values()):
        return (
            "conversations are learned from as instructions: name the file in instructions.source, and plain "
            "text in data.source"
        )
    if column in row and isinstance(row[column], str | bytes | None):
        return "correct the rows, or use another file"
    return f"no column of this row holds text: {', '.join(kinds)}" if kinds else "the row is empty"


def _texts(row: Mapping[Any, Any], prefix: str = "", depth: int = 1) -> Iterator[str]:
    """Names of the columns that hold text, those in tables with the table's name before theirs."""
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, str | bytes):
            yield name
        elif isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _texts(value, f"{name}.", depth + 1)


def listed(names: list[Any]) -> str:
    """Names of columns in a sentence."""
    # Names come from the file: as many and as long ones as it likes, and not always text.
    return ", ".join(map(_shown, names[:_MOST_NAMES]))


def _shown(name: Any) -> str:
    return " ".join(str(name)[:_LONGEST_NAME].encode(errors="replace").decode().split())
