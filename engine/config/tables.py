"""Tables that a feature adds one row to, and how somebody else's package adds its own.

A row is light: the code it stands for is named as ``module:attribute`` and loaded when it is wanted, so that
whoever only asks for a label loads no torch.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

from engine.errors import UsageError

EXTENSIONS = "EQAT_EXTENSIONS"
"""Environment variable: modules, separated by commas, that add rows to the tables when they are imported."""


def is_name(text: str) -> bool:
    """Whether a row, or a section of the configuration, can be called so: a plain word in lower case."""
    return re.fullmatch("[a-z][a-z0-9_]{0,39}", text) is not None


def is_folder_name(text: str) -> bool:
    """Whether a row can be called so that also names a folder: hyphens may stand between its words."""
    return is_name(text.replace("-", "_")) and not text.endswith("-")


class Named(Protocol):
    """What a table holds."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


class Table(Generic[Row]):
    """Rows in the order in which they are to be asked, each with a name of its own."""

    def __init__(self, what: str, *rows: Row, named: Callable[[str], bool] = is_name) -> None:
        """``what`` a row is, for messages: ``stage``; ``named`` says what one may be called."""
        self.what = what
        self._may_be_called = named
        self._rows: dict[str, Row] = {}
        for row in rows:
            self.register(row)

    def register(self, row: Row) -> None:
        """Add a row at the end.

        Raises:
            ValueError: for a name that is taken, or that is no plain word in lower case.
        """
        if not self._may_be_called(row.name):
            raise ValueError(f"{row.name!r} is no name for a {self.what}")
        if row.name in self._rows:
            raise ValueError(f"there is a {self.what} {row.name!r} already")
        self._rows[row.name] = row

    def unregister(self, name: str) -> None:
        """Take a row out again, which only tests want."""
        del self._rows[name]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def get(self, name: str) -> Row | None:
        """The row called ``name``; none for one that is not known here."""
        return self._rows.get(name)

    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(self._rows)


def load_named(reference: str) -> Any:
    """What ``module:attribute`` names; the attribute may be one of a class, ``Class.method``."""
    module, _, attribute = reference.partition(":")
    return attrgetter(attribute)(importlib.import_module(module))


def load_extensions() -> None:
    """Import the modules that :data:`EXTENSIONS` names; each registers what it brings.

    Raises:
        UsageError: for one that cannot be imported.
    """
    for module in filter(None, (name.strip() for name in os.environ.get(EXTENSIONS, "").split(","))):
        try:
            importlib.import_module(module)
        except Exception as error:  # of anybody's code
            raise UsageError(
                f"this extension cannot be imported: {type(error).__name__}: {str(error)[:200]}",
                where=f"{EXTENSIONS}={module}",
                hint="check the name and PYTHONPATH, or unset the variable",
            ) from error
