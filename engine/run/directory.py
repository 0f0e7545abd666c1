"""A run is a directory; both processes meet only there.

Each file has one writer. ``config.toml`` is written once when the run is made, ``run.json`` once by the
engine when it knows the machine, the model and the data. ``status.json`` is replaced every two seconds
(:mod:`engine.run.status`). ``events.jsonl`` only grows (:mod:`engine.run.event_log`). Whoever watches needs
nothing but read access.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.config.derived import absolute_paths
from engine.config.loading import load_run
from engine.config.run import RunConfig
from engine.config.writing import to_toml
from engine.errors import EqatError, PreflightError, UsageError
from engine.run import contents
from engine.run.proof import is_run
from engine.system.files import atomic_write, atomic_write_json, disk_error, make_folder
from engine.system.guarded import NoFile, read_object
from engine.system.ownership import require_own_folders
from engine.system.temporary import unique

FOLDER_MODE = 0o755
"""Of folders, less the umask: whatever that is, nobody else may write into a run."""


class RunDirectory:
    """Paths inside a run. Construct with :meth:`create` or :meth:`open`.

    ``link`` is the link it was found by, if it was one; then the run is called as that is.
    """

    def __init__(self, path: Path, link: Path | None = None) -> None:
        self.path = path
        self.link = link
        self.id = (link or path).name
        self.run_json = path / "run.json"
        self.config_toml = path / contents.CONFIG
        self.origin_path = path / "origin.json"
        self.lock_path = path / "lock"
        self.status_path = path / "status.json"
        self.launch_path = path / "launch.json"
        self.submitted_path = path / "submitted.json"
        self.events_path = path / "events.jsonl"
        self.control_dir = path / "control"
        self.logs_dir = path / "logs"
        self.checkpoints_dir = path / "checkpoints"
        self.cache_dir = path / "cache"
        self.eval_dir = path / "eval"
        self.export_dir = path / "export"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that every run is made with."""
        return tuple(self.path / name for name in contents.FOLDERS)

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    def require_own(self) -> None:
        """PreflightError unless the run and its folders are real ones of this user's; for whoever writes."""
        require_own_folders(self.path, (*self.folders, self.checkpoints_dir / "objects"))

    @classmethod
    def create(
        cls,
        runs_dir: Path,
        config: RunConfig,
        *,
        now: float | None = None,
        files: Mapping[str, msgspec.Struct] | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> RunDirectory:
        """Make the directory of a new run, with its folders, ``files`` (as JSON) and ``config.toml``.

        ``announce`` is told the run's id before there is anything: whoever keeps it loses no run by a kill.
        """
        name = f"{stamp(now)}-{slug(config.model.source)}-w{config.grid.bits}g{config.grid.group_size}"
        text = to_toml(absolute_paths(config)).encode()
        try:
            run = cls(make_new(runs_dir, name, announce))
        except OSError as error:
            raise disk_error(error, runs_dir) from error
        try:
            for folder in run.folders:
                make_folder(folder, root=run.path, mode=FOLDER_MODE)
            for file, content in (files or {}).items():
                atomic_write_json(run.path / file, content)
            atomic_write(run.config_toml, text)  # last: without it the directory is no run
        except EqatError:
            _unmake(run)
            raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """The run at ``path``; :class:`UsageError` where there is none."""
        place = os.path.expanduser(path)
        if not is_run(Path(place)):
            what = "is not a run directory" if os.path.lexists(place) else "does not exist"
            raise UsageError(what, where=str(path), hint="eqat runs lists the runs")
        return cls(Path(place).resolve())

    def config(self) -> RunConfig:
        """The configuration the run was made with."""
        return load_run(self.path)

    def own_text(self, key: str) -> Path:
        """Where the model's own text lies that ``key`` decided."""
        return self.path / contents.own_text_name(key)

    def inside(self, *parts: str) -> Path:
        """A path below the run; :class:`UsageError` for one that would leave it, by ``..`` or by a link."""
        root = self.path.resolve()
        path = root.joinpath(*parts)
        if "\0" in str(path) or not path.resolve().is_relative_to(root):
            raise UsageError("leaves the run directory", where="/".join(parts))
        return path

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write ``run.json``. It says what the run *was made from*, so it is written once."""
        if os.path.lexists(self.run_json):
            raise UsageError("exists already; a manifest is written once", where=str(self.run_json))
        atomic_write_json(self.run_json, manifest)

    def manifest(self) -> dict[str, Any] | None:
        """``run.json``, or none before the engine has written it."""
        try:
            return read_object(self.run_json)
        except NoFile:
            return None


def stamp(now: float | None = None) -> str:
    """The minute that the name of what is made now begins with."""
    return time.strftime("%Y%m%d-%H%M", time.localtime(now))


def make_new(runs_dir: Path, name: str, announce: Callable[[str], None] | None = None) -> Path:
    """Make a folder in ``runs_dir``, called ``name`` and four digits that no other has."""
    runs_dir.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    runs_dir = runs_dir.resolve()
    for _ in range(100):
        path = runs_dir / f"{name}-{unique(2)}"
        if announce is not None:
            announce(path.name)
        try:
            path.mkdir(mode=FOLDER_MODE)
        except FileExistsError:  # made in the same minute with the same four digits
            continue
        return path
    raise PreflightError("holds too many runs of this minute", where=str(runs_dir))


def _unmake(run: RunDirectory) -> None:
    """Remove what a creation that failed has made: an empty run is of no use to anybody."""
    try:
        for folder in run.folders:
            if folder.is_dir():
                folder.rmdir()
        run.path.rmdir()
    except OSError:
        pass  # it holds something, or cannot be removed; what made the creation fail is told


def slug(source: str) -> str:
    """The last part of the name of a model or file, as part of a directory's: lower case letters, digits,
    ``.-_``."""
    name = source.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix(".gguf")
    name = re.sub(r"[^a-z0-9._]+", "-", name).strip("-._")[:48]
    return name.rstrip("-._") or "model"
