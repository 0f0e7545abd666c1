"""Points as lines of JSON: ``{"t": …, "step": …, "values": {"block_ap/loss": …}, "texts": {…}}``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from engine.errors import UsageError
from engine.run.directory import RunDirectory
from eqat_tui.output import show
from eqat_tui.outside import outside_runs, write_failed
from eqat_tui.tracking.points import Point

ANOTHER = "choose another file with --to"


def open_lines(run: RunDirectory, to: Path | None) -> Printed | Written:
    """Lines on standard output, or in a new file."""
    return Printed() if to is None else Written(to)


class Printed:
    """Lines on standard output."""

    def write(self, points: Sequence[Point]) -> None:
        if points:
            show("\n".join(map(line_of, points)))

    def close(self) -> None:
        pass


class Written:
    """Lines in a file, which must not be there yet."""

    def __init__(self, path: Path) -> None:
        outside_runs(path, ANOTHER)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._file = os.fdopen(os.open(path, flags, 0o644), "wb", buffering=0)
        except FileExistsError as error:
            raise UsageError("exists already", where=str(path), hint=ANOTHER) from error
        except (OSError, ValueError) as error:  # ValueError for a name with a zero byte
            raise write_failed(error, path, ANOTHER) from error
        self._path = path

    def write(self, points: Sequence[Point]) -> None:
        data = memoryview("".join(f"{line_of(one)}\n" for one in points).encode())
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
        except OSError as error:
            raise write_failed(error, self._path, ANOTHER) from error

    def close(self) -> None:
        self._file.close()


def line_of(point: Point) -> str:
    """A point as one line, in ASCII: whatever a text holds is an escape of JSON."""
    tree: dict[str, object] = {"t": point.t, "step": point.step}
    if point.values:
        tree["values"] = point.values
    if point.texts:
        tree["texts"] = point.texts
    return json.dumps(tree, allow_nan=False).replace("\x7f", "\\u007f")
