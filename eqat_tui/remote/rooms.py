"""Folders for the copies of other machines' runs: each is its process's own, and gone with it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.system.files import disk_error
from engine.system.user_cache import attached_cache


@contextmanager
def room() -> Iterator[Path]:
    """A folder in the user's cache, which is gone afterwards; what a killed process has left goes first."""
    place = attached_cache()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place):
            for left in place.iterdir():
                if _is_free(left):
                    shutil.rmtree(left, ignore_errors=True)
            made = Path(tempfile.mkdtemp(dir=place))
            held = os.open(made, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_EX)
    except OSError as error:
        raise disk_error(error, place) from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(held)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _is_free(room: Path) -> bool:
    """Whether the process that has made it is gone."""
    if not room.is_dir() or room.is_symlink():
        return False
    held = os.open(room, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(held)
    return True
