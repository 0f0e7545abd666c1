"""Copying a verified checkpoint to a folder of the user's, whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from engine.run.errors import UsageError
from engine.run.files import disk_error


def check_target(folder: Path) -> None:
    """UsageError unless ``folder`` can be made, or is empty: nothing of the user's is overwritten."""
    another = "choose another folder"
    try:
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise UsageError("exists and is not an empty folder", where=str(folder), hint=another)
        above = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(folder), hint=another) from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK) or _is_virtual(above):
        raise UsageError(f"cannot be made in {above}", where=str(folder), hint=another)


def _is_virtual(folder: Path) -> bool:
    """A place that says it can be written and holds no files, such as /proc."""
    try:
        return shutil.disk_usage(folder).total == 0
    except OSError:
        return True


def publish(checkpoint: Path, folder: Path) -> None:
    """Copy ``checkpoint`` to ``folder``, which appears only when it is complete."""
    check_target(folder)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(checkpoint, partial)
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_error(error, folder) from error
