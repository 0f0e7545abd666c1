"""Files that a command writes for the user, outside of any run."""

from __future__ import annotations

import os
from pathlib import Path

from engine.errors import EqatError, ExitCode, UsageError
from engine.run.proof import is_run
from engine.system.files import disk_error
from engine.system.guarded import BadFile, open_regular


def outside_runs(place: Path, hint: str) -> None:
    """UsageError for a place inside a run: one with a file of somebody else's in it would not be deleted any
    more."""
    folder = place.absolute().parent.resolve()
    if any(is_run(above) for above in (folder, *folder.parents)):
        raise UsageError("lies inside a run", where=str(place), hint=hint)


def write_failed(error: Exception, place: Path, hint: str) -> EqatError:
    """What it means for the user that a file cannot be written: a full disk (7), or a wrong place (2)."""
    found = disk_error(error, place) if isinstance(error, OSError) else error
    if isinstance(found, EqatError) and found.exit_code == ExitCode.DISK_FULL:
        return EqatError(found.message, exit_code=found.exit_code, where=str(place), hint="free some space")
    message = found.message if isinstance(found, EqatError) else f"cannot be written: {found}"
    return UsageError(message, where=str(place), hint=hint)


def begins_with(file: Path, sign: str) -> bool:
    """Whether the file is a regular one that begins so; what a link leads to is not looked at."""
    if file.is_symlink():
        return False
    try:
        with os.fdopen(open_regular(file), "rb") as there:
            return there.read(len(sign)) == sign.encode()
    except (OSError, BadFile):
        return False
