"""Asking a running engine to stop: one small file a request, acknowledged by an event.

A file survives where a signal does not reach: another user's terminal, another host on the same file
system, a batch job. ``stop`` means checkpoint at the next step and exit resumable; ``abort`` means end now,
keeping the last checkpoint. SIGTERM and SIGINT mean the same as ``stop``.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Literal, get_args

import msgspec

from engine.errors import EqatError, ExitCode, UsageError
from engine.run import contents
from engine.run.directory import FOLDER_MODE, RunDirectory
from engine.run.lock import holder, opened_by
from engine.system.files import atomic_write_json, disk_error, make_folder
from engine.system.guarded import BadFile, opened_folder, read_struct
from engine.system.temporary import unique

Action = Literal["stop", "abort"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that an engine takes for a request; batch systems warn with the last."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request; ``id`` sorts by time."""

    id: str
    request: Action
    t: float
    pid: int


def request(run: RunDirectory, action: Action) -> str:
    """Ask for ``action``; the id that its acknowledgement will carry. On a full disk it is asked by signal,
    which nobody acknowledges."""
    if action not in get_args(Action):
        raise UsageError(f"cannot be {action!r}", where="request", hint="stop or abort")
    name = f"{time.time_ns():020d}-{unique(4)}"
    made = Request(id=name, request=action, t=time.time(), pid=os.getpid())
    try:
        _leave(run, made)
    except EqatError as error:
        # A full disk is when somebody may well want to stop a run, and it has no room for the file.
        if error.exit_code != ExitCode.DISK_FULL or not _signal(run, action):
            raise
    return name


def _leave(run: RunDirectory, made: Request) -> None:
    make_folder(run.control_dir, root=run.path, mode=FOLDER_MODE)
    atomic_write_json(run.control_dir / f"{made.id}.json", made, root=run.path)


def _signal(run: RunDirectory, action: Action) -> bool:
    """Ask by signal, where the engine is a process of this machine; two different ones mean abort."""
    pid = holder(run.lock_path)
    if not pid or not opened_by(run.lock_path, pid):
        return False
    try:
        for number in (signal.SIGTERM,) if action == "stop" else (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
    except OSError:
        return False
    return True


def pending(run: RunDirectory) -> list[Request]:
    """Requests that nobody has acknowledged, oldest first. Cheap: the training loop asks at every step."""
    try:
        with opened_folder(run.control_dir, run.path) as folder:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    except OSError:
        return []
    requests = []
    for name in filter(contents.REQUEST.fullmatch, names):
        try:
            found = read_struct(run.control_dir / name, Request, root=run.path)
        except BadFile:
            continue  # acknowledged meanwhile, or not written by us
        if f"{found.id}.json" == name:
            requests.append(found)
    return requests


def acknowledge(run: RunDirectory, request_id: str) -> None:
    """Take a request off the list; its file stays, as ``ID.done``. Twice is as good as once."""
    asked = f"{request_id}.json"
    if not contents.REQUEST.fullmatch(asked):
        raise UsageError(f"{request_id!r} is not the id of a request", where="control")
    try:
        with opened_folder(run.control_dir, run.path) as folder:
            os.replace(asked, f"{request_id}.done", src_dir_fd=folder, dst_dir_fd=folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise disk_error(error, run.control_dir / asked) from error


def discard_pending(run: RunDirectory) -> int:
    """Acknowledge what was asked of an attempt that is over, so that the next one does not stop at once."""
    requests = pending(run)
    for found in requests:
        acknowledge(run, found.id)
    return len(requests)
