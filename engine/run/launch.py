"""Starting the engine so that nothing of the terminal it was started from can end it.

Its own session (no SIGHUP, no Ctrl-C of the terminal), no standard input, and output into a log *file*: a
child that writes to a pipe dies of a broken pipe when its reader goes, hours into a run.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.errors import EqatError, PreflightError
from engine.run import contents
from engine.run.control import discard_pending
from engine.run.directory import FOLDER_MODE, RunDirectory
from engine.run.elsewhere import refuse_if_elsewhere
from engine.run.liveness import last_events, refuse_waiting, starting
from engine.run.lock import already_worked_on, holder
from engine.run.shares import ALL, Share
from engine.run.status import Launched, Status, read_launched
from engine.system.files import atomic_write_json, disk_error, make_folder, overwrite_in_place
from engine.system.guarded import names_in, open_regular, require_regular

ATTEMPT_VARIABLE = "EQAT_ATTEMPT"
"""Tells the engine which attempt, and so which log, it is."""

ENGINE = ("-P", "-m", "engine")
"""Arguments of Python that start the engine. -P: a folder named ``engine`` in the user's working
directory must not be taken for ours."""

MOST_ATTEMPTS = 10**6
"""A number above is no attempt of ours, whatever a log says."""

# Kept so that Python neither reaps these children behind our back nor warns that they still run.
_children: dict[int, subprocess.Popen[bytes]] = {}


def launch(
    run: RunDirectory,
    *,
    args: Sequence[str] = (),
    python: str = sys.executable,
    module: Sequence[str] = ENGINE,
    share: Share = ALL,
) -> int:
    """Start the engine on ``run`` and return its pid; ``args`` follow the directory on its command line.
    ``share`` is what it may take of the machine."""
    run.require_own()
    refuse_second(run)
    discard_pending(run)
    make_folder(run.logs_dir, root=run.path, mode=FOLDER_MODE)
    try:
        attempt, log = _new_log(run)
    except OSError as error:
        raise disk_error(error, run.logs_dir) from error
    begun = time.time()
    try:
        _reserve(run, attempt, begun)
    except EqatError:
        os.close(log)
        raise
    try:
        child = subprocess.Popen(
            [python, *module, str(run.path), *args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**engine_environment(attempt), **share.environment},
        )
        share.confine(child.pid)
    except OSError as error:
        raise PreflightError(f"the engine cannot be started: {error.strerror}", where=python) from error
    finally:
        os.close(log)
    _children[child.pid] = child
    launched = Launched(
        pid=child.pid,
        host=socket.gethostname(),
        attempt=attempt,
        t=begun,
        created=_created(child.pid, begun),
        task=_task(args),
    )
    try:
        atomic_write_json(run.launch_path, launched)
    except EqatError:
        # On a full disk in the place of the one before. Without any the engine runs all the same; only its
        # first moments, before it takes the lock, look like none.
        overwrite_in_place(run.launch_path, msgspec.json.encode(launched))
    return child.pid


def _reserve(run: RunDirectory, attempt: int, now: float) -> None:
    """A status, where there is none: it is overwritten in place, so that an engine can say on a full disk why
    it ends.

    Raises:
        EqatError: where not even that has room; an engine could not say so.
    """
    if not os.path.lexists(run.status_path):
        atomic_write_json(run.status_path, Status(doing="starting Python", heartbeat=now, attempt=attempt))


def refuse_second(run: RunDirectory, *, but: int = 0) -> None:
    """PreflightError that says who works on the run, or is about to on this machine; ``but`` may."""
    if os.path.lexists(run.lock_path):
        require_regular(os.lstat(run.lock_path), run.lock_path)  # no engine could take it
    owner = holder(run.lock_path)
    if owner is None:
        launched = read_launched(run)
        # One that was launched elsewhere cannot be asked; if it lives it will take the lock.
        here = launched is not None and launched.host == socket.gethostname()
        owner = starting(run) if here else None
    if owner is not None and owner != but:
        raise already_worked_on(owner, run.id, run.id)
    if owner is None:
        refuse_if_elsewhere(run)
        refuse_waiting(run)


def _task(args: Sequence[str]) -> str:
    """What an engine with these arguments does."""
    return args[args.index("--task") + 1] if "--task" in args[:-1] else "run"


def exit_code(pid: int) -> int | None:
    """How a child of this process's :func:`launch` ended (negative: by that signal), or none while it runs.

    Only for whoever launched it; everyone else reads the run's state and its finish event.
    """
    child = _children.get(pid)
    return child.poll() if child is not None else None


def next_attempt(run: RunDirectory) -> int:
    """One more than any attempt that left a log or an event."""
    logged = [int(match[1]) for match in map(contents.LOG.fullmatch, _logs(run)) if match]
    written = [event.attempt for event in last_events(run) if event.attempt < MOST_ATTEMPTS]
    return max([0, *(number for number in logged if number < MOST_ATTEMPTS), *written]) + 1


def this_attempt(run: RunDirectory) -> int:
    """The engine's own attempt: the one :func:`launch` gave it, or the next when started by hand."""
    given = os.environ.get(ATTEMPT_VARIABLE, "")
    if re.fullmatch(r"[0-9]{1,6}", given):
        attempt = int(given)
        # A variable that was inherited from elsewhere must not make two attempts one.
        written = (event.attempt for event in last_events(run) if event.attempt < MOST_ATTEMPTS)
        if attempt > max(written, default=0):
            return attempt
    return next_attempt(run)


def log_path(run: RunDirectory, attempt: int, rank: int = 0) -> Path:
    """Where the engine's output of ``attempt`` goes, or that of another of its processes."""
    return run.logs_dir / f"attempt-{attempt:03d}{f'-rank-{rank}' if rank else ''}.log"


def _new_log(run: RunDirectory) -> tuple[int, int]:
    """The next attempt's number and an open descriptor of its log, which nobody else has."""
    attempt = next_attempt(run)
    while True:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        try:
            return attempt, open_regular(log_path(run, attempt), flags, root=run.path)
        except FileExistsError:  # another launch was faster
            attempt += 1


def engine_environment(attempt: int) -> dict[str, str]:
    """The environment an engine is started in."""
    return {**python_environment(), ATTEMPT_VARIABLE: str(attempt)}


def python_environment() -> dict[str, str]:
    """The environment for a process of this program's heavy half."""
    environment = dict(os.environ)
    # A log that is read while it is written, and that holds the last words of a crash.
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONFAULTHANDLER"] = "1"
    root = Path(__file__).resolve().parents[2]
    if root.name not in ("site-packages", "dist-packages"):  # a checkout need not be installed
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *([known] if known else [])])
    return environment


def _created(pid: int, begun: float) -> float:
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return begun


def _logs(run: RunDirectory) -> list[str]:
    """What lies in the folder of logs, links included: their names are taken, too."""
    try:
        return names_in(run.logs_dir, run.path, lambda entry: True)
    except OSError:
        return []
