"""A run is a directory; both processes meet only there.

Each file has one writer. ``config.toml`` is written once when the run is made, ``run.json`` once by the
engine when it knows the machine, the model and the data. ``status.json`` is replaced every two seconds.
``events.jsonl`` only grows. Whoever watches needs nothing but read access.

What state a run is in follows from the lock, the heartbeat and how the event log ends: :func:`classify`.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.config.derived import absolute_paths
from engine.config.loading import load_run
from engine.config.run import RunConfig
from engine.config.writing import to_toml
from engine.errors import EqatError, ExitCode, PreflightError, UsageError
from engine.run.event_log import tail_events
from engine.run.events import AnyEvent, Outcome, RunFinished, RunStarted
from engine.run.lock import is_held
from engine.run.proof import is_run
from engine.system.files import atomic_write, atomic_write_json, disk_error, make_folder, overwrite_in_place
from engine.system.guarded import BadFile, NoFile, bad_file, opened_folder, read_object, read_struct
from engine.system.ownership import require_own_folders
from engine.system.temporary import temporary_of

State = Literal["created", "running", "hung", "crashed", "done", "stopped", "failed", "aborted"]

FOLDER_MODE = 0o755
"""Of folders, less the umask: whatever that is, nobody else may write into a run."""
DEFAULT_GRACE_S = 120.0
"""A heartbeat older than this means a hung engine, unless its status asks for more patience."""


_BETWEEN = frozenset({"metric", "memory"})
"""Nineteen events in twenty lie between the beginning of an attempt and its end."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """``status.json``: where the engine is now. Bytes and seconds; ``heartbeat`` is wall clock time."""

    phase: str = ""
    block: int | None = None
    blocks: int | None = None
    step: int | None = None
    steps: int | None = None
    eta_s: float | None = None
    heartbeat: float = 0.0
    grace_s: float = DEFAULT_GRACE_S
    """How long the engine may be silent now; a step that takes minutes raises it beforehand."""
    pid: int = 0
    """The engine; :func:`write_status` fills it in."""
    attempt: int = 1
    events_dropped: int = 0
    waiting: str = ""
    """Why the engine does nothing at the moment (a full disk), in one sentence; empty while it works."""
    outcome: Outcome | None = None
    """What the run is since this attempt has ended. The log says so too, unless the disk had no room for it:
    a status is written in the place of the one before."""
    exit_code: int | None = None
    failure: str = ""
    """Why the attempt failed, in one line."""


class Launched(msgspec.Struct, frozen=True, kw_only=True):
    """``launch.json``: the last engine that was started, before it has written anything itself."""

    pid: int
    host: str
    attempt: int
    t: float
    created: float
    """When the operating system says the process began, so that a reused pid is not taken for it."""
    task: str = "run"
    """What it does: ``run``, or something with a finished run."""


class RunDirectory:
    """Paths inside a run. Construct with :meth:`create` or :meth:`open`.

    ``link`` is the link it was found by, if it was one; then the run is called as that is.
    """

    def __init__(self, path: Path, link: Path | None = None) -> None:
        self.path = path
        self.link = link
        self.id = (link or path).name
        self.run_json = path / "run.json"
        self.config_toml = path / "config.toml"
        self.origin_path = path / "origin.json"
        self.lock_path = path / "lock"
        self.status_path = path / "status.json"
        self.launch_path = path / "launch.json"
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
        work = (self.control_dir, self.logs_dir, self.checkpoints_dir, self.cache_dir)
        return (*work, self.eval_dir, self.export_dir)

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
    ) -> RunDirectory:
        """Make the directory of a new run, with its folders, ``files`` (as JSON) and ``config.toml``."""
        stamp = time.strftime("%Y%m%d-%H%M", time.localtime(now))
        name = f"{stamp}-{_slug(config.model.source)}-w{config.grid.bits}g{config.grid.group_size}"
        text = to_toml(absolute_paths(config)).encode()
        try:
            runs_dir.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            run = cls(_make_new(runs_dir.resolve(), name))
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
            raise UsageError("is not a run directory", where=str(path), hint="eqat runs lists the runs")
        return cls(Path(place).resolve())

    def config(self) -> RunConfig:
        """The configuration the run was made with."""
        return load_run(self.path)

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


def _make_new(runs_dir: Path, name: str) -> Path:
    for _ in range(100):
        path = runs_dir / f"{name}-{secrets.token_hex(2)}"
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


def _slug(source: str) -> str:
    """The last part of a model's name, as part of a directory's: lower case letters, digits, ``.-_``."""
    name = source.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix(".gguf")
    name = re.sub(r"[^a-z0-9._]+", "-", name).strip("-._")[:48]
    return name.rstrip("-._") or "model"


# -- status and state ----------------------------------------------------------------------------------


def write_status(run: RunDirectory, status: Status) -> bool:
    """Replace ``status.json``. A heartbeat must not end a run, so a failure is only returned as False.

    A full disk has no room for a new file, but the old one's place is there: without a heartbeat a run that
    waits for room would seem to hang.
    """
    status = msgspec.structs.replace(status, pid=status.pid or os.getpid())
    try:
        atomic_write_json(run.status_path, status)
    except EqatError as error:
        return error.exit_code == ExitCode.DISK_FULL and overwrite_in_place(
            run.status_path, msgspec.json.encode(status)
        )
    except OSError:
        return False
    return True


def clean_temporaries(run: RunDirectory) -> None:
    """Remove half-written files that a killed engine left; only for whoever holds the lock.

    Of those alone that no other process writes: a request or a launch may be written at this moment.
    """
    try:
        with opened_folder(run.path) as folder:
            for name in os.listdir(folder):
                if temporary_of(name) in ("status.json", "run.json"):
                    os.unlink(name, dir_fd=folder)
    except OSError:
        pass  # they are in nobody's way


def read_status(run: RunDirectory) -> Status | None:
    """The last status, or none where there is none that can be read.

    Only the engine that wrote it can be waiting: what a dead one, or a former attempt's, waited for is over.
    """
    try:
        status = read_struct(run.status_path, Status)
    except BadFile:
        return None
    if status.waiting and not _written_by_holder(run, status):
        return msgspec.structs.replace(status, waiting="")
    return status


def _written_by_holder(run: RunDirectory, status: Status) -> bool:
    """Whether a status comes from the engine that holds the lock: taking it renews the file's time."""
    try:
        return is_held(run.lock_path) and status.heartbeat >= os.lstat(run.lock_path).st_mtime
    except OSError:
        return False


def last_events(run: RunDirectory) -> list[AnyEvent]:
    """The end of the run's log; :class:`PreflightError` where there is one that cannot be read."""
    try:
        return tail_events(run.events_path)
    except OSError as error:
        raise bad_file(error, run.events_path) from error


def _last_mark(run: RunDirectory, events: list[AnyEvent]) -> RunStarted | RunFinished | None:
    """The last beginning or end of an attempt, which may lie far before the end of the log, ``events``."""
    found = _marks(events)
    if not found and events:
        # Looked for again at every look at a run that died in a long phase; its log does not change any more.
        found = _marks_of(run.events_path, _size(run.events_path))
    return found[-1] if found else None


def _marks(events: list[AnyEvent]) -> list[RunStarted | RunFinished]:
    return [event for event in events if isinstance(event, RunStarted | RunFinished)]


@functools.lru_cache(64)
def _marks_of(log: Path, size: int) -> list[RunStarted | RunFinished]:
    try:
        return _marks(tail_events(log, lambda found: bool(_marks(found)), skip=_BETWEEN))
    except OSError:
        return []


def classify(
    *,
    lock_held: bool,
    heartbeat_age: float | None,
    grace: float,
    finish_outcome: Outcome | None,
    ever_started: bool,
) -> State:
    """The state rule of a run.

    A lock that is held means an engine: alive while its heartbeat is younger than ``grace`` (no heartbeat
    yet counts as young: the lock has only just been taken), hung after. A free lock with a finish event
    for the last attempt gives that outcome; without one the attempt crashed, if there ever was one.
    """
    if lock_held:
        return "hung" if heartbeat_age is not None and heartbeat_age > grace else "running"
    if finish_outcome is not None:
        return finish_outcome
    return "crashed" if ever_started else "created"


def run_state(run: RunDirectory, *, now: float | None = None) -> State:
    """The state of ``run`` now: gathers what :func:`classify` needs."""
    now = time.time() if now is None else now
    held = is_held(run.lock_path)
    events = last_events(run)
    outcome = None if held else _outcome(run, events)
    started = _size(run.events_path) > 0
    if not held:
        launched = read_launched(run)
        if launched is not None and launched.t > max((event.t for event in events), default=0.0):
            if _starting(launched, now):
                return "created"  # the engine is importing its libraries and has not taken the lock
            started = True
            if launched.task == "run":
                outcome = None  # it died before its first event
        if is_held(run.lock_path):  # taken while we looked elsewhere
            held = True
    status = read_status(run)
    return classify(
        lock_held=held,
        heartbeat_age=_heartbeat_age(run, status, now) if held else None,
        grace=status.grace_s if status is not None else DEFAULT_GRACE_S,
        finish_outcome=outcome,
        ever_started=started,
    )


def _outcome(run: RunDirectory, events: list[AnyEvent]) -> Outcome | None:
    """How the last attempt ended, or what it left the run as; none for one that was cut off in training."""
    last, newest = _last_mark(run, events), events[-1].attempt if events else 0
    status = read_status(run)
    # A log on a full disk ends before its attempt does, or does not even begin.
    told = status.outcome if status is not None and status.attempt >= newest else None
    if isinstance(last, RunFinished) and last.attempt == newest:
        beyond = status is not None and status.attempt > newest and told is not None
        return told if beyond else last.leaves or last.outcome
    return told or (last.leaves if isinstance(last, RunStarted) else None)


def _heartbeat_age(run: RunDirectory, status: Status | None, now: float) -> float | None:
    """Seconds since the last sign of life. Taking the lock is one: the status may be a former attempt's."""
    signs = [status.heartbeat] if status is not None else []
    try:
        signs.append(os.lstat(run.lock_path).st_mtime)
    except OSError:
        pass
    return now - max(signs) if signs else None


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def read_launched(run: RunDirectory) -> Launched | None:
    """Who was started last, or none."""
    try:
        return read_struct(run.launch_path, Launched)
    except BadFile:
        return None


def starting(run: RunDirectory) -> int | None:
    """The pid of an engine that was launched and has not taken the lock or written anything yet, or none."""
    launched = read_launched(run)
    if launched is None or not _starting(launched, time.time()):
        return None
    written = max((event.t for event in last_events(run)), default=0.0)
    return launched.pid if launched.t > written else None


def _starting(launched: Launched, now: float) -> bool:
    if launched.host != socket.gethostname():
        return now - launched.t < DEFAULT_GRACE_S  # cannot be asked from here
    return process_alive(launched.pid, launched.created)


def process_alive(pid: int, created: float) -> bool:
    """Whether the process that began at ``created`` still runs; a zombie or a reused pid does not."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < 2.0
    except (psutil.Error, ValueError, OverflowError):  # a number that is no process's
        return False
