"""Where a report is written: never over a file that is not one, and never into a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from engine.errors import EqatError, UsageError
from engine.run.directory import RunDirectory
from engine.system.files import atomic_write
from engine.system.guarded import BadFile, open_regular
from eqat_tui.outside import outside_runs, write_failed
from eqat_tui.report.page import SIGN

ANOTHER = "choose another file with --to"


def default_file(runs: Sequence[RunDirectory]) -> Path:
    """What a report is called where no file was named: as its first run."""
    more = f"-and-{len(runs) - 1}-more" if len(runs) > 1 else ""
    return Path(f"{runs[0].id}{more}.html")


def check_place(file: Path) -> None:
    """UsageError unless a report can be written to ``file``, before it is made."""
    where = str(file)
    if not os.path.isdir(file.parent):
        raise UsageError("lies in no folder that is there", where=where, hint=ANOTHER)
    outside_runs(file, ANOTHER)
    if not os.path.lexists(file):
        return
    if file.is_dir():
        raise UsageError("is a folder", where=where, hint="name a file: --to FOLDER/report.html")
    if not _is_report(file):
        raise UsageError("exists and is no report of eqat", where=where, hint=ANOTHER)


def write_report(file: Path, page: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        UsageError: see :func:`check_place`, and where nothing can be written there.
        EqatError: with code 7 where the disk is full.
    """
    check_place(file)
    try:
        atomic_write(file, page.encode("utf-8"))
    except EqatError as error:
        raise write_failed(error, file, ANOTHER) from error


def _is_report(file: Path) -> bool:
    """Whether the file is one that was written here; what a link leads to is not looked at."""
    if file.is_symlink():
        return False
    try:
        with os.fdopen(open_regular(file), "rb") as there:
            return there.read(len(SIGN)) == SIGN.encode()
    except (OSError, BadFile):
        return False
