"""A run of another machine as a run here: copies of its log and of some small files, and its :class:`Sight`.

A thread reads what ``eqat tail-events`` says over there. When the connection is lost it connects again, after
ever longer pauses, and goes on at the byte of the log that it had come to: no event is lost, none is told
twice. Meanwhile what was seen last is shown, and that it is of then; a run whose machine cannot be seen has
not crashed.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from engine import __version__
from engine.errors import EqatError, ExitCode, PreflightError
from engine.run import contents, control
from engine.run.liveness import Look
from engine.run.sight import FromAfar, SeenFromAfar
from engine.run.status import Status
from engine.system.log_bytes import LONGEST_LINE
from eqat_tui.output import format_time
from eqat_tui.remote.rooms import room
from eqat_tui.remote.ssh import Destination, no_ssh
from eqat_tui.remote.wire import SILENT_S, TOP_FILES, Again, File, Hello, Seen, Told, decode, newer

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Before connecting again, the last one for ever."""
PIECE = 1 << 18


class Mirror(SeenFromAfar):
    """The copies."""

    def __init__(self, path: Path, connection: Connection) -> None:
        super().__init__(path)
        self.sight: FromAfar = connection


class Connection:
    """What is read from over there, and what can be asked. All of it may be called from any thread."""

    def __init__(self, destination: Destination, ref: str, flags: tuple[str, ...], room: Path) -> None:
        self.destination = destination
        self.host = destination.host
        self.ref = ref
        """What names the run over there."""
        self.place = f"{destination.host}:{ref}"
        self.beginnings = 0
        self.run: Mirror | None = None
        self.failure: EqatError | None = None
        """Why nothing more will come."""
        self._flags, self._room = flags, room
        self._seen: Seen | None = None
        self._skew = 0.0
        self._heard = time.monotonic()
        self._log, self._offset = "", 0
        self._lost, self._again_at = "", 0.0
        self._greeted = False
        self._copy: IO[bytes] | None = None
        self._hung_up = False
        self._child: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._keep_connected, name="connection", daemon=True)

    # -- life --------------------------------------------------------------------------------------

    def open(self) -> Mirror:
        """Connect, and wait until everything that there is now has come.

        Raises:
            EqatError: where that does not succeed at once; afterwards it is tried for ever.
        """
        self._thread.start()
        self._ready.wait()
        if self.failure is not None or self.run is None:
            raise self.failure or PreflightError("has said nothing", where=self.host)
        return self.run

    def close(self) -> None:
        """End it."""
        self._over.set()
        self.hang_up()
        self._thread.join(5.0)
        if self._copy is not None:
            self._copy.close()

    def _keep_connected(self) -> None:
        tries = 0
        try:
            while not self._over.is_set():
                self._greeted = False
                code, said = self._listen()
                if self._over.is_set() or self.failure is not None:
                    break
                problem = self.destination.failure(code, said)
                # Only what eqat over there says of the run itself will not change by waiting.
                if self.run is None or not self.there() or code == ExitCode.USAGE:
                    self.failure = problem
                    break
                tries = 0 if self._greeted else tries + 1
                pause = PAUSES_S[min(tries, len(PAUSES_S) - 1)]
                self._again_at = time.monotonic() + pause
                self._lost = "" if self._greeted else problem.message
                self._lost = self._lost.removeprefix("cannot be reached: ") or "the connection was lost"
                self._over.wait(pause)
        except Exception as error:
            self.failure = error if isinstance(error, EqatError) else PreflightError(str(error))
        finally:
            self._ready.set()

    def _listen(self) -> tuple[int, bytes]:
        """One connection to its end: how ssh ended, and what it said."""
        came_before = self.run is not None
        arguments = ["tail-events", self.ref, *([] if came_before else self._flags)]
        if self._log:
            arguments += ["--from", str(self._offset), "--log", self._log]
        with tempfile.TemporaryFile() as said:
            try:
                child = subprocess.Popen(
                    self.destination.start(*arguments, may_ask=not came_before),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=said,
                )
            except OSError as error:
                raise no_ssh(error) from error
            self._child, self._heard, self._hung_up = child, time.monotonic(), False
            assert child.stdout is not None
            try:
                with child.stdout:
                    for line in self._lines(child.stdout.fileno()):
                        self._hear(line)
            finally:
                self.hang_up()
                code = _ended(child)
            said.seek(0)
            return code, said.read()

    def _lines(self, stream: int) -> Iterator[bytes]:
        """The whole lines that come, until nothing does for too long or the connection is broken off.

        What ssh has started may go on writing when ssh is gone; nobody waits for that.
        """
        poll = select.poll()
        poll.register(stream, select.POLLIN)
        rest = b""
        while not (self._hung_up or self._over.is_set() or self._is_silent()):
            if not poll.poll(200):
                continue
            piece = os.read(stream, PIECE)
            if not piece:
                return  # half a line before it comes again
            self._heard = time.monotonic()
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
            if len(rest) > LONGEST_LINE:
                rest = b""  # no event is as long, and what comes of it is no line of ours

    def _is_silent(self) -> bool:
        """Whether nothing has come for too long. The first time somebody may be typing a password."""
        return self.run is not None and time.monotonic() - self._heard > SILENT_S

    def hang_up(self) -> None:
        """Break the connection off; unless everything is over, another one is made."""
        child, self._hung_up = self._child, True
        if child is not None and child.poll() is None:
            try:
                child.wait(0.2)  # its own word is worth more than our signal
            except subprocess.TimeoutExpired:
                child.terminate()

    # -- what comes --------------------------------------------------------------------------------

    def _hear(self, line: bytes) -> None:
        if not self._greeted and (version := newer(line)):
            raise PreflightError(
                f"runs eqat {version}, whose runs this one ({__version__}) cannot follow",
                where=self.host,
                hint="install the same version here",
            )
        message = decode(line)
        if isinstance(message, Hello):
            self._greet(message)
        elif self._greeted and message is not None:
            self._take(message)

    def _greet(self, hello: Hello) -> None:
        if self.run is None:
            name = hello.id if re.fullmatch(r"[^/\0]{1,255}", hello.id) and hello.id.strip(".") else "run"
            folder = self._room / name
            (folder / "logs").mkdir(parents=True)
            (folder / "eval").mkdir()
            self.ref, self.place = hello.path, f"{self.host}:{hello.path}"
            self.run = Mirror(folder, self)
            self._copy = self.run.events_path.open("ab", buffering=0)
        if hello.start == 0 or hello.start != self._offset:
            self._from_beginning()
        self._log, self._offset, self._greeted = hello.log, hello.start, True

    def _from_beginning(self) -> None:
        assert self._copy is not None
        self._copy.truncate(0)
        self.beginnings += bool(self._offset)
        self._offset = 0

    def _take(self, message: File | Told | Again | Seen) -> None:
        assert self._copy is not None
        match message:
            case Told():
                self._copy.write(bytes(message.event) + b"\n")
                self._offset = message.end
            case Again():
                self._from_beginning()
                self._log = message.log
            case File():
                self._keep(message)
            case Seen():
                self._skew = message.now - time.time()
                self._seen, self._lost = message, ""
                self._ready.set()

    def _keep(self, file: File) -> None:
        """A file that a run has, under its own name; anything else is passed over."""
        assert self.run is not None
        folder, _, name = file.name.rpartition("/")
        known = {
            "": name in TOP_FILES,
            "eval": name == contents.MEASURED,
            "logs": bool(contents.LOG.fullmatch(name)),
        }
        if known.get(folder, False):
            new = self.run.path / "new"
            new.write_text(file.text)
            os.replace(new, self.run.path / folder / name)

    # -- what is seen (engine.run.sight.Sight) -------------------------------------------------------

    def _last(self) -> Seen:
        return self._seen if self._seen is not None else Seen(now=time.time())

    def there(self) -> bool:
        return self._last().there

    def look(self) -> Look:
        seen = self._last()
        return Look(seen.state, seen.work)

    def status(self) -> Status | None:
        return self._last().status

    def pid(self) -> int | None:
        return self._last().pid

    def requests(self) -> tuple[control.Request, ...]:
        return self._last().requests

    def why_gone(self, attempt: int, code: int | None = None) -> str:
        return self._last().why_gone

    def now(self) -> float:
        """While nobody can be seen there it is when somebody was seen last."""
        return self._last().now if self.trouble() else time.time() + self._skew

    def require(self) -> None:
        if self.failure is not None and self.there():
            raise self.failure

    def trouble(self) -> str:
        if not self.there():
            return ""
        if self.failure is not None:
            return f"nothing more comes from {self.host}: {self.failure.message}"
        if not self._lost:
            return ""
        left = self._again_at - time.monotonic()
        then = f"trying again in {left:.0f} s" if left >= 1 else "trying again now"
        seen = format_time(self._last().now - self._skew)
        return f"connection to {self.host} lost, {then}; seen last at {seen} ({self._lost})"

    # -- what can be asked ---------------------------------------------------------------------------

    def ask(self, action: control.Action) -> str:
        self.destination.run("stop", self.ref, *(["--abort"] if action == "abort" else []))
        return ""

    def types(self, command: str) -> str:
        """What to type for a command of eqat on the run."""
        if command == "attach":
            return f"eqat attach {shlex.quote(f'{self.host}:{self.ref}')}"
        return self.destination.types(command, self.ref)

    def resume(self) -> None:
        """Start its engine again."""
        self.destination.run("resume", self.ref, "--detach")

    def kill(self) -> None:
        """Kill its engine."""
        self.destination.run("stop", self.ref, "--kill")


def _ended(child: subprocess.Popen[bytes]) -> int:
    """How it has ended, at last."""
    try:
        return child.wait(5.0)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


@contextmanager
def attached(destination: Destination, ref: str, *, runs_dir: str | None = None) -> Iterator[Mirror]:
    """Inside, the run ``ref`` of over there is a run here; ``runs_dir`` is where runs are kept there."""
    flags = ("--runs-dir", runs_dir) if runs_dir is not None else ()
    with room() as folder:
        connection = Connection(destination, ref, flags, folder)
        try:
            yield connection.open()
        finally:
            connection.close()
