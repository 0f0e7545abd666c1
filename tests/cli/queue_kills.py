"""Works on queues in processes that are killed, each at a later instant than the one before.

    python queue_kills.py FOLDER

Every queue is then worked on once more. Where this prints nothing and ends with 0, no entry was lost and none
begun twice. An engine is here a process that takes its run's lock, notes that it did, and says that it is
done.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from engine.config.derived import resolve
from engine.config.loading import load
from engine.errors import PreflightError
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.finding import list_runs
from engine.run.launch import refuse_second
from engine.run.lock import RunLock
from engine.run.queue import Queue
from eqat_tui import queue_worker

CONFIG = resolve(load("smoke"))
WRITING = os.O_WRONLY | os.O_RDWR


def engine(run: RunDirectory) -> int:
    """Start what stands for an engine; it takes a moment until it says anything, as a real one does."""
    refuse_second(run)
    pid = os.fork()
    if pid:
        return pid
    unhook()
    time.sleep(0.005)
    try:
        with RunLock(run.lock_path), EventWriter(run.events_path, 1) as writer:
            with open(run.path.parent / "begun", "a") as begun:
                begun.write(f"{run.id}\n")
            writer.emit(
                events.RunStarted(id=run.id, pid=os.getpid(), host="", device="cpu", versions={}, argv=[])
            )
            writer.emit(events.RunFinished(outcome="done", exit_code=0, seconds=0.1))
    except PreflightError:
        os._exit(3)
    os._exit(0)


def exit_code(pid: int) -> int | None:
    try:
        gone, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(status) if gone else None


left = 0
"""Instants until this process is killed; 0 of one that is not."""


def unhook() -> None:
    global left
    left = 0


def instant(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: whatever changes something outside of this process is an instant."""
    global left
    if not left or event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.fork", "fcntl.lockf"):
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
        return
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


def worked(queue: Queue, instants: int = 0) -> int:
    """Work on the queue in a process of its own; how it ended."""
    pid = os.fork()
    if not pid:
        global left
        left = instants
        os._exit(queue_worker.Worker(queue).work())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(place: Path) -> int:
    queue_worker.launch = engine  # type: ignore[assignment]
    queue_worker.exit_code = exit_code
    queue_worker._problem = lambda entry: None
    queue_worker.POLL_S, queue_worker.QUIET_S = 0.002, 0.05
    os.fsync = lambda file: None  # the disk does not fail here, and waiting for it takes most of the time
    sys.addaudithook(instant)
    ended, instants, first_is_over = -signal.SIGKILL, 0, False
    while ended == -signal.SIGKILL and not first_is_over:  # the second has the same instants
        instants += 1
        queue, runs = Queue(place / f"queue{instants}"), place / f"runs{instants}"
        runs.mkdir()
        with queue.changing():
            queue.add(CONFIG, runs)
            queue.add(CONFIG, runs)
        ended = worked(queue, instants)
        queue.read()  # whole, whenever it was
        first_is_over = queue.entries[0].over is not None
        again = worked(queue)
        queue.read()
        begun = (runs / "begun").read_text().split()
        known = [entry.run for entry in queue.entries]
        outcomes = [entry.over.outcome if entry.over else None for entry in queue.entries]
        made = {run.id for run in list_runs(runs)}
        if (again, outcomes, len(begun)) != (0, ["done"] * 2, 2) or not set(begun) == set(known) == made:
            print(instants, again, outcomes, begun, known, made)
            return 1
    if not first_is_over or instants < 20:
        print("ended with", ended, "after", instants)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
