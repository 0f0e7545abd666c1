"""Where runs are kept, and which of them is meant.

A run is found by its id or any part of it, any part of the name that its configuration has, a path, or
``latest``; one that is linked into the runs folder by the name that it is listed under, too. What several
runs have in theirs means none of them, and they are listed.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path

from engine.config.user import load_user_config
from engine.errors import EqatError, PreflightError, UsageError
from engine.run.directory import RunDirectory
from engine.run.proof import is_run
from engine.system.files import existing, is_virtual

MOST_LISTED = 12
"""Of the runs that something may mean, so many are named."""


def default_runs_dir(flag: str | os.PathLike[str] | None = None) -> Path:
    """``--runs-dir``, else ``$EQAT_RUNS_DIR``, else the user's ``runs_dir``, else ``./runs``.

    Raises:
        UsageError: for a file of the user's that cannot be used, where it is asked.
    """
    named = flag or os.environ.get("EQAT_RUNS_DIR") or load_user_config().runs_dir
    return Path(os.path.expanduser(named or "runs"))


def check_runs_dir(runs_dir: Path) -> Path:
    """``runs_dir``, or the folder above it that exists; :class:`PreflightError` where no runs can be made."""
    place = existing(runs_dir)
    what = "" if os.access(place, os.W_OK | os.X_OK) else "cannot be written"
    if is_virtual(place):
        what = "holds no files, so no run can be made in it"
    if not os.path.isdir(place):
        what = "is a file, not a folder"
    if what:
        raise PreflightError(what, where=str(place), hint="choose another place with --runs-dir")
    return place


def list_runs(runs_dir: Path) -> list[RunDirectory]:
    """The runs in ``runs_dir``, newest first; none where there is no such directory.

    A link to a run is listed under its own name, unless the run itself is listed, or another link to it.
    """
    different: dict[Path, RunDirectory] = {}
    for run in _entries(runs_dir):
        different.setdefault(run.path, run)
    return sorted(different.values(), key=_made, reverse=True)


def _entries(runs_dir: Path) -> list[RunDirectory]:
    """Every entry of ``runs_dir`` that is a run or a link to one, real folders first."""
    try:
        # Hidden ones are deletions that were cut off.
        found = [path for path in runs_dir.iterdir() if not path.name.startswith(".") and is_run(path)]
        place = Path(os.path.realpath(runs_dir))
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise UsageError("is a file, not a folder", where=str(runs_dir)) from error
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(runs_dir)) from error
    runs = [_found_at(place / path.name) for path in sorted(found)]
    return sorted(runs, key=lambda run: run.link is not None)


def _found_at(path: Path) -> RunDirectory:
    """The run at ``path``, which may be a link to it."""
    return RunDirectory(path.resolve(), path if path.is_symlink() else None)


def find_run(runs_dir: Path, ref: str) -> RunDirectory:
    """The run that ``ref`` means: ``latest``, an id, a path, or what only one run has in its id or name.

    A whole id counts for more than a beginning, that for more than an end, and that for more than any other
    part. A run that is listed by a link is found by the link's name and by its own id, which its engine uses.
    """
    if not ref:
        raise UsageError("names no run", where="run", hint="latest, an id, or a path")
    if "/" in ref or ref in (".", ".."):
        return _open_found(ref)
    runs = list_runs(runs_dir)
    if ref == "latest":
        if not runs:
            raise UsageError("there are no runs yet", where=full(runs_dir), hint="eqat run demo makes one")
        return runs[0]
    # A second name of a run that is listed already means it too, but only when it is given whole.
    exact = [run for run in _entries(runs_dir) if run.id == ref]
    found = exact or [run for run in runs if run.path.name == ref]
    found = found or [run for run in runs if any(name.startswith(ref) for name in _names(run))]
    found = found or [run for run in runs if any(name.endswith(f"-{ref}") for name in _names(run))]
    if not found and is_run(Path(ref)):
        return _open_found(ref)
    part = ref.lower()
    found = found or [run for run in runs if any(part in name.lower() for name in _names(run))]
    found = found or [run for run in runs if part in _configured_name(run).lower()]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(run.id for run in found[:MOST_LISTED])
        more = f" and {len(found) - MOST_LISTED} more" if len(found) > MOST_LISTED else ""
        raise UsageError(f"{ref!r} means {len(found)} runs", where="run", hint=f"{ids}{more}")
    where = full(runs_dir)
    raise UsageError(f"there is no run {ref!r} in {where}", where="run", hint="eqat runs lists the runs")


def full(runs_dir: Path) -> str:
    """A folder of runs as it is named in messages: ``runs`` alone says nothing of where it was looked for."""
    return os.path.abspath(runs_dir)


def typed(run: RunDirectory) -> str:
    """What to type here for ``run``: its id, which may be that of a link to it, or a path."""
    return typed_path(run.path, run.id)


def typed_path(path: Path, name: str = "") -> str:
    """What to type here for the run or the sweep at ``path``: its ``name`` where runs are looked for, else
    the path."""
    name = name or path.name
    try:
        here = (default_runs_dir() / name).samefile(path)
    except (OSError, EqatError):  # there is none of that name, or a file of the user's cannot be used
        here = False
    return name if here else shlex.quote(shorten(path))


def shorten(path: str | Path) -> str:
    """``path`` as typed from here, when it lies below the working directory."""
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):
        return str(path)
    return str(path) if relative.startswith("..") else relative


def _open_found(ref: str) -> RunDirectory:
    """The run at the path ``ref``."""
    run = RunDirectory.open(ref)
    place = Path(os.path.expanduser(ref)).absolute()
    return RunDirectory(run.path, place if place.is_symlink() else None)


def _names(run: RunDirectory) -> tuple[str, str]:
    """How a run is listed, and how it calls itself."""
    return run.id, run.path.name


def _configured_name(run: RunDirectory) -> str:
    """What its configuration calls a run; nothing where that cannot be read."""
    try:
        return run.config().name
    except EqatError:
        return ""


def _made(run: RunDirectory) -> tuple[str, int]:
    """Sorts by the time in the id, and within a minute by the file that was written when it was made."""
    try:
        written = run.config_toml.stat().st_mtime_ns
    except OSError:
        written = 0
    stamp = run.path.name[:13]
    if not re.fullmatch(r"\d{8}-\d{4}", stamp):  # a run that was renamed
        stamp = time.strftime("%Y%m%d-%H%M", time.localtime(written / 1e9))
    return stamp, written
