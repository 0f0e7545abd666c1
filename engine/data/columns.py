"""The column of a row that holds its text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from engine.data.lines import is_text
from engine.errors import DataError


def missing_column(column: str, available: Iterable[str], where: str) -> DataError:
    """The error for a column that is not there: says which ones are."""
    # Names come from the file: as many and as long ones as it likes, and not always text.
    shown = [str(name)[:60].encode(errors="replace").decode() for name in itertools.islice(available, 20)]
    names = ", ".join(" ".join(name.split()) for name in shown)
    return DataError(f"no column {column!r}", where=where, hint=f"set data.column to one of: {names}")


def checked_text(value: object, column: str, where: str) -> str | None:
    """A row's text; an empty cell is skipped, anything but a string is an error."""
    if isinstance(value, str) and not is_text(value):
        raise DataError(
            f"column {column!r} holds half a character (a lone surrogate)",
            where=where,
            hint="correct or remove this row",
        )
    if value is None or isinstance(value, str):
        return value
    raise DataError(
        f"column {column!r} holds {type(value).__name__}, not text", where=where, hint="set data.column"
    )
