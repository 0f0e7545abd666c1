"""Deleting runs, and freeing what can be made again.

Whoever cleans a run holds its lock, so no engine starts in the middle. A run that is deleted first loses its
name: a deletion that is cut off leaves nothing that looks like a run, and ``eqat gc`` finishes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.run import generations
from engine.run.directory import RunDirectory, holder, starting
from engine.run.errors import PreflightError
from engine.run.files import disk_error
from engine.run.lock import RunLock
from engine.run.state import BULK, load_state

REMOVED = ".removed-"
UNFINISHED_EXPORTS = ("*.partial", "*.failed")


def delete_run(run: RunDirectory) -> int:
    """Delete a run; the bytes that became free.

    Raises:
        PreflightError: while an engine works on it.
    """
    refuse_busy(run)
    freed = size_of(run.path)
    hidden = run.path.with_name(f"{REMOVED}{run.id}-{secrets.token_hex(4)}")
    with RunLock(run.lock_path):
        try:
            run.path.rename(hidden)
        except OSError as error:
            raise disk_error(error, run.path) from error
    _remove_tree(hidden)
    return freed


def refuse_busy(run: RunDirectory) -> None:
    """PreflightError while somebody works on the run, or an engine for it is just starting."""
    owner = holder(run.lock_path)
    if owner is None:
        owner = starting(run)
    if owner is not None:
        raise PreflightError(
            f"process {owner} works on it", where=run.id, hint=f"eqat stop {run.id} ends it first"
        )


def clean_run(run: RunDirectory, *, dry_run: bool = False) -> int:
    """Free what a run can make again: activations, old generations, half-written files; the bytes freed.

    Of a finished run one generation is kept, if it is intact, of another two.

    Raises:
        PreflightError: while an engine works on it.
    """
    refuse_busy(run)
    with RunLock(run.lock_path):
        garbage = list(_garbage(run))
        freed = sum(size_of(path) for path in garbage)
        freed += _prune(run, dry_run)
        if not dry_run:
            for path in garbage:
                _remove_tree(path)
    return freed


def clean_leftovers(runs_dir: Path, *, dry_run: bool = False) -> int:
    """Finish deletions that were cut off; the bytes freed."""
    leftovers = list(runs_dir.glob(f"{REMOVED}*"))
    freed = sum(size_of(path) for path in leftovers)
    if not dry_run:
        for path in leftovers:
            _remove_tree(path)
    return freed


def _prune(run: RunDirectory, dry_run: bool) -> int:
    """Remove old generations, unless that could take the only good one.

    What a generation that cannot be read is made of is not known, so then nothing is removed.
    """
    place = run.checkpoints_dir
    last = generations.newest(place)
    if not _is_inside(run, "checkpoints/objects") or not last:
        return 0
    keep = 1 if _is_done(run) and _is_intact(place, last) else generations.GENERATIONS_KEPT
    try:
        for number in range(last, max(0, last - keep), -1):
            if generations.generation_path(place, number).exists():
                generations.read_generation(place, number)
    except generations.DamagedCheckpoint:
        return 0
    return generations.prune(place, keep=keep, dry_run=dry_run)


def _is_intact(place: Path, number: int) -> bool:
    """Whether all that a generation names is there and hashes to its name."""
    try:
        for digest in set(generations.read_generation(place, number).entries.values()):
            with generations.object_path(place, digest).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return False
    except (OSError, generations.DamagedCheckpoint):
        return False
    return True


def _is_done(run: RunDirectory) -> bool:
    """The outcome of the last attempt, which the lock that we hold hides from the state rule."""
    return load_state(run, skip=BULK).outcome == "done"


def _garbage(run: RunDirectory) -> Iterator[Path]:
    """Files and folders that no continuation needs."""
    yield from _inside(run, "cache", ("*",))
    yield from _inside(run, "export", UNFINISHED_EXPORTS)
    # An export that was replaced; where its successor is missing, it is the only one there is.
    yield from (old for old in _inside(run, "export", ("*.old",)) if old.with_suffix("").exists())
    for folder in (".", "control"):
        yield from _inside(run, folder, (".*.tmp",))
    if not generations.newest(run.checkpoints_dir):  # else pruning does it
        for folder in ("checkpoints", "checkpoints/objects"):
            yield from _inside(run, folder, (".*.tmp",))


def _inside(run: RunDirectory, folder: str, patterns: Iterable[str]) -> Iterator[Path]:
    """What lies directly in a folder of the run; nothing where a link leads elsewhere."""
    if not _is_inside(run, folder):
        return
    for pattern in patterns:
        yield from (run.path / folder).glob(pattern)


def _is_inside(run: RunDirectory, folder: str) -> bool:
    place = run.path / folder
    return place.is_dir() and place.resolve() == run.path.resolve() / folder


def size_of(path: Path) -> int:
    """Bytes that deleting ``path`` would free: links are not followed, shared files count nothing."""
    total = 0
    for entry in _walk(path):
        try:
            status = entry.lstat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            total += status.st_size
    return total


def _walk(path: Path) -> Iterator[Path]:
    yield path
    if path.is_symlink() or not path.is_dir():
        return
    for folder, names, files in os.walk(path, followlinks=False):
        for name in (*names, *files):
            yield Path(folder, name)


def _remove_tree(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder."""
    try:
        while os.path.lexists(path):
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(FileNotFoundError):  # somebody else deletes it too
                shutil.rmtree(path)
    except OSError as error:
        raise disk_error(error, path) from error
