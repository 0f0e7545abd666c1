"""Where a report is written: never over a file that is not one, and never into a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from engine.errors import EqatError, UsageError
from engine.run.directory import RunDirectory
from engine.system.files import atomic_write
from eqat_tui.outside import begins_with, outside_runs, write_failed
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
    if not begins_with(file, SIGN):
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
