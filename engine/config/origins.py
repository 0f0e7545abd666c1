"""Where a field of a configuration is written, so that what is wrong with it names the file and the line."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from engine.errors import UsageError
from engine.system.guarded import BadFile, read_text

_TABLE = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]")
_KEY = re.compile(r"""\s*([\w."'\s-]+?)\s*=""")
_EXTENDS = re.compile(r"""\s*extends\s*=\s*["'](.+\.toml)["']""")


def located(error: UsageError, path: Path, *, typed: Collection[str] = ()) -> UsageError:
    """``error``, which names a field, with the file (``path``, or one that it extends) and the line that set
    it; the same where no file did, or the command line (``typed``) had the last word."""
    field = re.sub(r"\[.*?\]", "", error.where)
    if field in typed:
        return error
    for file in _layers(path):
        line = line_of(file, field)
        if line is not None:
            where = f"{file}, line {line}: {error.where}"
            return UsageError(error.message, where=where, hint=error.hint)
    return error


def _layers(path: Path) -> Iterator[Path]:
    """``path``, then what it extends by a path, as far as that goes."""
    seen: set[str] = set()
    while os.path.realpath(path) not in seen:
        seen.add(os.path.realpath(path))
        yield path
        parent = next(filter(None, map(_EXTENDS.match, _text(path).splitlines())), None)
        if parent is None:
            return
        path = Path(os.path.realpath(path)).parent / os.path.expanduser(parent[1])


def line_of(path: Path, field: str) -> int | None:
    """The line of a TOML file that sets ``section.name``, or of the table that holds it."""
    wanted = field.split(".")
    table: list[str] = []
    around: int | None = None
    for number, row in enumerate(_text(path).splitlines(), 1):
        if head := _TABLE.match(row):
            table = _names(head[1])
            around = number if table == wanted else around
        elif key := _KEY.match(row):
            found = [*table, *_names(key[1])]
            if found == wanted:
                return number
            around = number if wanted[: len(found)] == found else around
    return around


def _names(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]


def _text(path: Path) -> str:
    try:
        return read_text(path, follow=True)
    except BadFile:
        return ""
