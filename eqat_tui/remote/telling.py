"""``eqat tail-events``: a run told to somebody who is elsewhere, line by line (:mod:`eqat_tui.remote.wire`).

It only reads the run's files and writes to its own stdout. Nobody has to end it: when its reader is gone, the
next line ends it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from engine import __version__
from engine.errors import EqatError
from engine.run import contents
from engine.run.directory import RunDirectory
from engine.run.event_log import parse_lines
from engine.run.events import RunFinished
from engine.run.liveness import last_events
from engine.run.sight import sight_of
from engine.run.status import read_launched
from engine.system.guarded import BadFile, read_bytes
from engine.system.log_bytes import head, tail, whole_lines
from eqat_tui.remote.wire import (
    BEAT_S,
    LARGEST_FILE,
    LOG_BYTES,
    TOP_FILES,
    Again,
    AnyMessage,
    File,
    Hello,
    Seen,
    Told,
    encode,
    log_mark,
)

POLL_S = 0.5


def tell(run: RunDirectory, *, offset: int = 0, log: str = "", once: bool = False) -> None:
    """Write messages on stdout until the reader or the run is gone; ``once`` only what there is now.

    ``offset`` is the byte of the log to begin at, ``log`` what the log was known by that it belongs to; where
    that is another one now, everything is told from the beginning.
    """
    teller = Teller(run, offset=offset, log=log)
    out = sys.stdout.buffer

    def write(message: AnyMessage) -> None:
        out.write(encode(message))

    write(teller.hello())
    while teller.turn(write) and not once:
        out.flush()
        time.sleep(POLL_S)
    out.flush()


class Teller:
    """What was told of a run already, and what is new."""

    def __init__(self, run: RunDirectory, *, offset: int = 0, log: str = "") -> None:
        self.run = run
        self._sight = sight_of(run)
        self._log = log_mark(run.events_path)
        self._offset = self._start(offset, log)
        self._files: dict[str, tuple[int, int, int]] = {}
        self._seen: Seen | None = None

    def hello(self) -> Hello:
        """The first line."""
        return Hello(
            eqat=__version__,
            id=self.run.id,
            path=str(self.run.path),
            log=self._log,
            start=self._offset,
        )

    def turn(self, write: Callable[[AnyMessage], None]) -> bool:
        """Tell what is new; whether the run is still there.

        What is seen is looked at first and told last: an engine that has ended has written all of its log, so
        whoever hears that it is gone has heard its last word.
        """
        seen = self._look()
        for file in self._changed_files():
            write(file)
        for message in self._new_events():
            write(message)
        if self._seen is None or seen.now - self._seen.now >= BEAT_S or _differ(seen, self._seen):
            self._seen = seen
            write(seen)
        return seen.there

    def _start(self, offset: int, log: str) -> int:
        """Where in the log to begin: at the beginning of a line, and of the log unless it is the one of
        before."""
        if log and log != self._log:
            return 0
        try:
            if offset <= 0 or head(self.run.events_path, 1, offset - 1) == b"\n":
                return max(0, offset)
            # Whoever says which log it is counts in whole lines of it: this one was cut, or written anew.
            return 0 if log else _next_line(self.run.events_path, offset)
        except (OSError, BadFile):
            return 0

    def _new_events(self) -> Iterator[AnyMessage]:
        log = self.run.events_path
        try:
            if self._is_another():
                self._log, self._offset = log_mark(log), 0
                yield Again(log=self._log)
            for lines, behind in whole_lines(log, self._offset):
                at = behind - len(lines)
                for line in lines.split(b"\n")[:-1]:
                    at += len(line) + 1
                    if _is_json(line):
                        yield Told(end=at, event=msgspec.Raw(line))
                self._offset = behind
        except (OSError, BadFile):
            return  # not there yet, or a network file system that hiccups

    def _is_another(self) -> bool:
        """Whether the log is another one than before, shorter than what was told of it, or there at last."""
        if self._offset and not head(self.run.events_path, 1, self._offset - 1):
            return True
        return log_mark(self.run.events_path) not in ("", self._log)

    def _changed_files(self) -> Iterator[File]:
        names = [*TOP_FILES, f"eval/{contents.MEASURED}"]
        try:
            names += sorted(f"logs/{path.name}" for path in self.run.logs_dir.iterdir() if _is_log(path))
        except OSError:
            pass
        for name in names:
            try:
                path = self.run.inside(name)
                found = path.lstat()
                mark = (found.st_ino, found.st_size, found.st_mtime_ns)
                if self._files.get(name) == mark:
                    continue
                data = tail(path, LOG_BYTES)[0] if _is_log(path) else read_bytes(path, LARGEST_FILE)
            except (OSError, EqatError):
                continue
            self._files[name] = mark
            yield File(name=name, text=data.decode(errors="replace"))

    def _look(self) -> Seen:
        now = self._sight.now()
        if not self._sight.there():
            return Seen(now=now, there=False)
        try:
            state, work = self._sight.look()
            newest = 0 if work is not None else self._silent_attempt()
            why = self._sight.why_gone(newest) if newest else ""
        except (OSError, EqatError):
            if self._seen is not None:
                return msgspec.structs.replace(self._seen, now=now)
            raise
        return Seen(
            now=now,
            state=state,
            work=work,
            status=self._sight.status(),
            pid=self._sight.pid() if work is not None else None,
            requests=self._sight.requests() if work is not None else (),
            why_gone=why,
        )

    def _silent_attempt(self) -> int:
        """The attempt that was started last, where it has had no last word; else 0."""
        launched, events = read_launched(self.run), last_events(self.run)
        said = events[-1].attempt if events else 0
        newest = max(said, launched.attempt if launched is not None else 0)
        ended = newest == said and any(
            isinstance(event, RunFinished) and event.attempt == newest for event in events
        )
        return 0 if ended else newest


def _differ(one: Seen, other: Seen) -> bool:
    return one != msgspec.structs.replace(other, now=one.now)


def _is_log(path: Path) -> bool:
    return contents.LOG.fullmatch(path.name) is not None


def _is_json(line: bytes) -> bool:
    """Whether a line of the log is an object that can be passed on within another; any event of ours is,
    whatever its kind."""
    if not (line.startswith(b"{") and line.endswith(b"}")):
        return False
    if parse_lines(line):
        return True
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _next_line(log: Path, offset: int) -> int:
    """The beginning of the first line behind ``offset``; the end of a log that has none."""
    while piece := head(log, LARGEST_FILE, offset):
        found = piece.find(b"\n")
        if found >= 0:
            return offset + found + 1
        offset += len(piece)
    return offset
