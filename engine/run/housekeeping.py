"""Deleting runs, and freeing what can be made again.

Nothing is deleted that is not proven to be ours: runs by :mod:`engine.run.proof`, files in them by their
names in :mod:`engine.run.contents`. Whoever cleans a run holds its lock, so no engine starts in the middle. A
run that is deleted first loses its name: a deletion that is cut off leaves nothing that looks like a run, and
``eqat gc`` finishes it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from engine.config.formats import FORMATS
from engine.errors import PreflightError
from engine.run import contents, generations
from engine.run.directory import RunDirectory
from engine.run.elsewhere import refuse_if_elsewhere
from engine.run.events import BULK
from engine.run.finding import typed
from engine.run.liveness import refuse_waiting, starting
from engine.run.lock import RunLock, holder
from engine.run.proof import FolderIdentity, prove_made_here, prove_removed, prove_run
from engine.run.removal import not_deleted, remove_entry, remove_file, remove_proven, rename_proven
from engine.run.state import load_state
from engine.run.usable import current_is_intact
from engine.system.guarded import names_in, opened_folder
from engine.system.temporary import temporary_of, unique

LONGEST_NAME = 255
"""Bytes that a file system allows a name."""


class Swept(NamedTuple):
    """What became of deletions that were cut off."""

    freed: int
    """Bytes."""
    left_alone: tuple[PreflightError, ...]
    """Why something that is called like one was not touched, or could not be."""


class Cleanable(NamedTuple):
    """Bytes of a run that it can make again."""

    activations: int
    checkpoints: int
    """Generations before those that are kept."""
    unfinished: int
    """Half-written files, and exports that were replaced."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


# -- deleting a run ------------------------------------------------------------------------------------


def delete_run(run: RunDirectory) -> int:
    """Delete a run; the bytes that became free.

    Raises:
        PreflightError: for what is not proven to be a run, and while an engine works on it.
    """
    identity = require_deletable(run)
    freed = size_of(run.path)
    with RunLock(run.lock_path):
        try:
            hidden = rename_proven(run.path, _removed_name(run.path.name), identity)
        except FileNotFoundError as error:
            raise PreflightError("was deleted by somebody else just now", where=str(run.path)) from error
        except OSError as error:
            raise not_deleted(error, run.path) from error
    remove_proven(hidden, identity)
    return freed


def require_deletable(run: RunDirectory) -> FolderIdentity:
    """Which folder it is that deleting ``run`` would delete.

    Raises:
        PreflightError: for what is not proven to be a run, and while an engine works on it.
    """
    identity = prove_run(run.link or run.path)
    refuse_busy(run)
    return identity


def refuse_busy(run: RunDirectory) -> None:
    """PreflightError while somebody works on the run, or an engine for it is just starting."""
    owner = holder(run.lock_path)
    if owner is None:
        owner = starting(run)
    if owner is not None:
        raise PreflightError(
            f"process {owner} works on it",
            where=run.id,
            hint=f"eqat stop {typed(run)} ends it first",
        )
    refuse_if_elsewhere(run)
    refuse_waiting(run)


def _removed_name(name: str) -> str:
    """What a run called ``name`` is called while it is being deleted."""
    ending = f"-{unique(4)}"
    while len(os.fsencode(f"{contents.REMOVED}{name}{ending}")) > LONGEST_NAME:
        name = name[:-1]
    return f"{contents.REMOVED}{name}{ending}"


def clean_leftovers(runs_dir: Path, *, dry_run: bool = False) -> Swept:
    """Finish deletions that were cut off; what is only called like one is left alone."""
    freed, left_alone = 0, []
    try:
        place = runs_dir.resolve()
        names = sorted(name for name in os.listdir(place) if name.startswith(contents.REMOVED))
    except OSError:
        return Swept(0, ())  # no runs yet
    for name in names:
        try:
            identity = prove_removed(place / name)
            size = size_of(place / name)
            if not dry_run:
                remove_proven(place / name, identity)
            freed += size
        except PreflightError as error:
            if os.path.lexists(place / name):  # else somebody else has finished it meanwhile
                left_alone.append(error)
    return Swept(freed, tuple(left_alone))


# -- cleaning a run ------------------------------------------------------------------------------------


def clean_run(run: RunDirectory, *, dry_run: bool = False) -> int:
    """Free what a run can make again: activations, old generations, half-written files; the bytes freed.

    Of a finished run one generation is kept, if it is intact, of another two.

    Raises:
        PreflightError: for what was not made as a run, and while an engine works on it.
    """
    return _clean(run, dry_run=dry_run).total


def cleanable(run: RunDirectory) -> Cleanable:
    """What :func:`clean_run` would free, under the same conditions."""
    return _clean(run, dry_run=True)


def _clean(run: RunDirectory, *, dry_run: bool) -> Cleanable:
    prove_made_here(run.path)
    refuse_busy(run)
    activations = unfinished = 0
    with RunLock(run.lock_path):
        for folder, names in _garbage(run):
            freed = sum(size_of(folder / name) for name in names)
            if folder == run.cache_dir:
                activations += freed
            else:
                unfinished += freed
            if not dry_run:
                _remove_from(folder, run.path, names)
        return Cleanable(activations, _prune(run, dry_run), unfinished)


def clean_temporaries(run: RunDirectory) -> None:
    """Remove half-written files that a killed engine left; only for whoever holds the lock.

    Of those alone that no other process writes: a request or a launch may be written at this moment.
    """
    with contextlib.suppress(OSError), opened_folder(run.path) as folder:  # they are in nobody's way
        for name in os.listdir(folder):
            if temporary_of(name) in ("status.json", "run.json"):
                remove_file(folder, name)


def foreign_in_cache(run: RunDirectory) -> list[str]:
    """Names in ``cache/`` that the engine does not make, and that therefore nobody removes."""
    return _names(run, "cache", lambda name: not contents.is_cached(name), lambda entry: True)


def remove_cache(run: RunDirectory) -> None:
    """Remove the activations of a run that has come to its end; what somebody else put beside them stays."""
    with contextlib.suppress(OSError, PreflightError):
        _remove_from(run.cache_dir, run.path, _names(run, "cache", contents.is_cached))
        with opened_folder(run.path) as folder:
            os.rmdir("cache", dir_fd=folder)


def _garbage(run: RunDirectory) -> Iterator[tuple[Path, list[str]]]:
    """Folders of a run, each with the names of what lies in it and no continuation needs; of checkpoints
    :func:`_prune` knows."""
    patterns: list[tuple[str, Callable[[str], bool]]] = [
        (".", contents.is_unfinished_at_top),
        ("control", contents.is_unfinished_request),
        ("eval", contents.is_unfinished_measurement),
        ("cache", contents.is_cached),
    ]
    for folder, ours in patterns:
        yield run.path / folder, _names(run, folder, ours)
    there = exports(run)
    yield (
        run.export_dir,
        [
            made + ending
            for made in FORMATS.names()
            for ending in contents.LEFTOVERS
            # An export that was replaced; where its successor is missing, it is the only one there is.
            if made + ending in there and (ending != contents.OLD or made in there)
        ],
    )


def exports(run: RunDirectory) -> list[str]:
    """Folders in ``export/``, whole or not."""
    return _names(run, "export", lambda name: True, lambda entry: entry.is_dir(follow_symlinks=False))


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False)


def _names(
    run: RunDirectory,
    folder: str,
    wanted: Callable[[str], bool],
    kind: Callable[[os.DirEntry[str]], bool] = _is_file,
) -> list[str]:
    """What lies directly in a folder of the run, sorted: only what is of the ``kind``.

    Nothing where the folder, or one above it, is a link that leads elsewhere.
    """
    try:
        return names_in(run.path / folder, run.path, lambda entry: wanted(entry.name) and kind(entry))
    except OSError:
        return []


def _remove_from(folder: Path, root: Path, names: list[str]) -> None:
    if not names:
        return
    try:
        with opened_folder(folder, root) as opened:
            for name in names:
                remove_entry(opened, name)
    except (OSError, RecursionError) as error:
        raise not_deleted(error, folder) from error


def _prune(run: RunDirectory, dry_run: bool) -> int:
    """Remove old generations, unless that could take the only good one."""
    place = run.checkpoints_dir
    if not _is_inside(run, "checkpoints/objects"):
        return 0
    keep = 1 if _is_done(run) and current_is_intact(place) else generations.GENERATIONS_KEPT
    return generations.prune(place, keep=keep, dry_run=dry_run)


def _is_done(run: RunDirectory) -> bool:
    """The outcome of the last attempt, which the lock that we hold hides from the state rule."""
    return load_state(run, skip=BULK).outcome == "done"


def _is_inside(run: RunDirectory, folder: str) -> bool:
    place = run.path / folder
    return place.is_dir() and place.resolve() == run.path.resolve() / folder


# -- tokenized text ------------------------------------------------------------------------------------


def clean_tokens(cache: Path, *, dry_run: bool = False) -> int:
    """Remove tokenized text from ``cache``, which may be a folder of the user's; the bytes freed."""
    try:
        folder = os.open(cache, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return 0  # nothing was tokenized yet
    try:
        freed = 0
        for name in sorted(filter(contents.is_cached_text, os.listdir(folder))):
            freed += remove_file(folder, name, dry_run=dry_run)
        return freed
    except OSError as error:
        raise not_deleted(error, cache) from error
    finally:
        os.close(folder)


# -- sizes ---------------------------------------------------------------------------------------------


def size_of(path: Path) -> int:
    """Bytes that deleting ``path`` would free: links are not followed, shared files count nothing."""
    total, waiting = 0, [path]
    while waiting:
        place = waiting.pop()
        try:
            status = place.lstat()
            if stat.S_ISDIR(status.st_mode):
                waiting += [place / name for name in os.listdir(place)]
        except OSError:  # gone meanwhile
            continue
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            total += status.st_size
    return total
