"""What an attempt says of itself before it has a reporter, while its libraries load.

That takes seconds, on a network disk half a minute. Whoever looks meanwhile is told by ``status.json`` what
the engine does and for how long; and whoever looks after it was killed finds its first event.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.status import Status, write_status
from engine.run.task import Task

STATUS_SECONDS = 1.0
LOADING_SILENCE = 600.0
"""Seconds that one library may take unheard: a cold network disk is slow."""


class Starting:
    """An attempt that loads its libraries; :meth:`says` what it does, on a thread that beats beside it."""

    def __init__(self, run: RunDirectory, attempt: int, task: Task, leaves: events.Outcome | None) -> None:
        self.run, self.attempt, self.task, self.leaves = run, attempt, task, leaves
        self._began = time.monotonic()
        self._doing = ""
        self._beat = time.time()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_status, name="starting", daemon=True)

    def begin(self, doing: str) -> None:
        """Give the first sign of life: an event, and a status from now on."""
        with EventWriter(self.run.events_path, self.attempt) as writer:
            writer.emit(
                events.AttemptStarting(
                    pid=os.getpid(), host=socket.gethostname(), task=self.task, leaves=self.leaves
                )
            )
        self.says(doing)
        self._thread.start()

    def says(self, doing: str) -> None:
        """What comes now, in words."""
        self._doing, self._beat = doing, time.time()

    def close(self) -> None:
        """Somebody else speaks from now on."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep_status(self) -> None:
        while not self._done.is_set():
            write_status(self.run, self._status())  # where that is not possible, the event says it
            self._done.wait(STATUS_SECONDS)

    def _status(self) -> Status:
        return Status(
            doing=self._doing,
            phase_s=time.monotonic() - self._began,
            heartbeat=self._beat,
            grace_s=LOADING_SILENCE,
            attempt=self.attempt,
        )


@contextmanager
def starting(
    run: RunDirectory, attempt: int, task: Task, leaves: events.Outcome | None
) -> Iterator[Starting]:
    """An attempt's first words, which end with the context at the latest."""
    voice = Starting(run, attempt, task, leaves)
    try:
        yield voice
    finally:
        voice.close()
