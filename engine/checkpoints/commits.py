"""How a checkpoint is committed: at once or by a thread beside other work; and what happens when the disk is
full.

Until a commit is done the generation before stays in force. A full disk is no reason to lose a run: the
previous checkpoint is whole, the run says what it needs and waits until there is room.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from engine.checkpoints.store import CheckpointStore, Committed
from engine.config.runtime import RuntimeConfig
from engine.errors import StopRequested
from engine.plan.estimate import size_text
from engine.reporter import Reporter
from engine.run import events
from engine.system.files import disk_error, existing, full_disk

T = TypeVar("T")

WAIT_SECONDS = 1.0
TRY_AGAIN_SECONDS = 60.0
"""Room may come back without showing (a quota), so the write is tried again after this long anyway."""
WORTH_TELLING_SECONDS = 1.0
NOTICEABLE_BYTES = 1 << 20
"""Free space that came back, not the ups and downs of logs."""


class Checkpoints:
    """A run's checkpoint store as the pipeline uses it: says what it committed, waits while the disk is
    full."""

    def __init__(self, store: CheckpointStore, report: Reporter, runtime: RuntimeConfig) -> None:
        self.store, self.report, self.runtime = store, report, runtime
        self.cost = 0.0
        """Seconds that training lost to its last snapshot."""

    def commit(
        self,
        phase: str,
        block: int | None = None,
        entries: Mapping[str, Mapping[str, Tensor]] | None = None,
        *,
        beside: tuple[int, float] = (0, 0.0),
    ) -> None:
        """Publish ``entries`` (tensors on the CPU) and whatever was remembered; waits while the disk is full.

        ``beside`` are bytes and seconds that were spent on files of the checkpoint before.
        """

        done = self.patiently(lambda: self._publish(entries or {}), _needed(entries or {}))
        done = Committed(done.generation, done.bytes + beside[0], done.seconds + beside[1])
        self.say(done, phase, block)

    @contextmanager
    def committing(
        self, phase: str, block: int, entries: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[None]:
        """:meth:`commit` by a thread, beside what happens in the context, which must not use the store.

        It is done when the context ends, however that ends; only an abort does not wait. A full disk is
        waited for then.
        """
        writing = Writing(self, lambda: self._publish(entries), _needed(entries))
        try:
            yield
        except BaseException as error:
            left = writing.leave(error)
            if left is not None:
                self.say(left, phase, block)
            raise
        began = time.monotonic()
        committed = writing.result()
        self.say(committed, phase, block, waited=time.monotonic() - began)

    def _publish(self, entries: Mapping[str, Mapping[str, Tensor]]) -> Committed:
        for name, tensors in entries.items():
            self.store.put(name, tensors)
        return self.store.commit()

    def say(
        self,
        committed: Committed,
        phase: str,
        block: int | None,
        step: int | None = None,
        waited: float | None = None,
    ) -> None:
        """Tell what was committed; training ``waited`` so long for it (all the time, when not given)."""
        foreground = committed.seconds if waited is None else waited
        self.report.emit(
            events.CheckpointCommitted(
                generation=committed.generation,
                bytes=committed.bytes,
                seconds=foreground,
                phase=phase,
                block=block,
                step=step,
                background_seconds=0.0 if waited is None else committed.seconds,
            )
        )

    def patiently(
        self, work: Callable[[], T], needed: int, what: str = "a checkpoint", place: Path | None = None
    ) -> T:
        """``work()``, which writes ``needed`` bytes, again whenever there is room, while the disk is full.

        It leaves nothing half-written behind when it fails. ``what`` it writes (``an export``) is said to
        whoever follows the run; ``place`` is the folder whose disk counts, else that of the checkpoints.

        Raises:
            StopRequested: when a stop is asked for while there is no room.
        """
        try:
            while True:
                try:
                    done = work()
                except Exception as error:
                    if not _disk_is_full(error):
                        raise
                else:
                    self._tell_of_pause(self.report.go_on())
                    return done
                self._wait_for_room(needed, what, place or self.store.directory)
        finally:
            self.report.go_on()

    def _tell_of_pause(self, seconds: float) -> None:
        """What was said when it began may have had no room in the log."""
        if seconds >= WORTH_TELLING_SECONDS:
            self.report.warning("disk_room", f"there is room again, after a pause of {round(seconds)} s")

    def _wait_for_room(self, needed: int, what: str, place: Path) -> None:
        place = existing(place)
        free = _free_bytes(place)
        if not self.report.waiting:
            size = f" of {size_text(needed)}" if needed else ""
            self.report.pause(
                f"the disk is full: {what}{size} does not fit into the {size_text(free)} free at {place}; "
                "what was written before is whole, and the run goes on by itself once there is room"
            )
            self.report.warning("disk_full", self.report.waiting, "free some space, or stop the run")
        again = time.monotonic() + TRY_AGAIN_SECONDS
        # Where there seems to be room, something else than the disk's size (a quota) is in the way.
        enough = needed if free < needed else free + NOTICEABLE_BYTES
        while time.monotonic() < again and _free_bytes(place) < enough:
            self.report.leave_if_asked()
            time.sleep(WAIT_SECONDS)


class Writing(Generic[T]):
    """``work()``, which writes ``needed`` bytes, by a thread."""

    def __init__(self, checkpoints: Checkpoints, work: Callable[[], T], needed: int) -> None:
        self._checkpoints, self._work, self._needed = checkpoints, work, needed
        self._done: Future[T] = Future()
        self._thread = threading.Thread(target=self._try_once, name="checkpoint", daemon=True)
        self._thread.start()

    def _try_once(self) -> None:
        try:
            self._done.set_result(self._work())
        except BaseException as failure:
            self._done.set_exception(failure)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> T:
        """Waits for the thread. What stood in its way is raised, a full disk waited for.

        Raises:
            StopRequested: at an abort; the process ends in the middle of the write, and what was published
                before stays.
        """
        self._wait()
        failure = self._done.exception()
        if failure is None:
            return self._done.result()
        if not _disk_is_full(failure):
            raise failure
        return self._checkpoints.patiently(self._work, self._needed)

    def leave(self, error: BaseException) -> T | None:
        """Whatever ends the run, what is being written counts, and is what comes back; only an abort does not
        wait for it. None of what could not be written: that is not why the run ends."""
        if isinstance(error, StopRequested) and error.abort:
            return None
        self._wait()
        return None if self._done.exception() is not None else self._done.result()

    def _wait(self) -> None:
        while self.running:
            self._thread.join(0.05)
            stop = self._checkpoints.report.stop_asked()
            if stop is not None and stop.abort:
                raise stop


def _needed(entries: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(bytes_of(tensors) for tensors in entries.values())


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Of the elements of ``tensors``."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _disk_is_full(error: BaseException) -> bool:
    """A file that may not grow beyond a limit of this process (EFBIG) will not fit later either."""
    return full_disk(error) not in (None, errno.EFBIG)


def _free_bytes(place: Path) -> int:
    try:
        return shutil.disk_usage(place).free
    except OSError as error:  # the run was deleted while it waited
        raise disk_error(error, place) from error
