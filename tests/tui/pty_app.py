"""The app in a terminal of its own (a pseudo-terminal), to measure what it sends and what it costs."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from waiting import PATIENCE, handles, wait_until

REPOSITORY = Path(__file__).parents[2]
# Without compiled files every start compiles the program again, which is no start of a user.
NOT_OURS = (
    "NO_COLOR",
    "COLUMNS",
    "LINES",
    "COLORFGBG",
    "EQAT_RUNS_DIR",
    "EQAT_THEME",
    "PYTHONDONTWRITEBYTECODE",
)
TRUE_COLOUR = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
SIXTEEN = {"TERM": "xterm", "COLORTERM": ""}


LAUNCHER = """
import fcntl, os, sys, termios, time
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
said = int(sys.argv[1])
os.write(said, b"%.6f" % time.monotonic())
os.close(said)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
"""Takes the terminal, says when it is, becomes the app. Forked off directly, the app would first have to get
rid of this process's memory: gigabytes, late in a run of all tests."""


class PtyApp:
    """``eqat ARGUMENTS`` behind a pseudo-terminal; what it wrote is read with :meth:`read`."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        size: tuple[int, int] = (80, 24),
        python: Sequence[str] = ("-m", "eqat_tui"),
        **environment: str,
    ) -> None:
        self.output = b""
        kept = {k: v for k, v in os.environ.items() if k not in NOT_OURS}
        base = {
            **kept,
            "PYTHONPATH": str(REPOSITORY),
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
            **TRUE_COLOUR,
        }
        self._fd, end = pty.openpty()
        self.resize(size)
        heard, said = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-ES", "-c", LAUNCHER, str(said), *python, *arguments],
            cwd=cwd,
            env={**base, **environment},
            stdin=end,
            stdout=end,
            stderr=end,
            pass_fds=(said,),
        )
        os.close(end)
        os.close(said)
        self.pid = self._process.pid
        self.began = float(os.read(heard, 64))
        """When the app's own process began."""
        os.close(heard)

    def __enter__(self) -> PtyApp:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()  # nothing to one that has ended
        self._process.wait()
        os.close(self._fd)

    def resize(self, size: tuple[int, int]) -> None:
        """Make the terminal ``size`` (columns, rows)."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._fd, keys.encode())

    def signal(self, number: int) -> None:
        """Send the app a signal, once it has a handler for it."""
        wait_until(lambda: handles(self.pid, number))
        os.kill(self.pid, number)

    def read(self, seconds: float, until: bytes | None = None) -> bytes:
        """What it writes in so many seconds, or until ``until`` occurs in it."""
        got, deadline = b"", time.monotonic() + seconds
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self._fd], [], [], 0.01)
            if not ready:
                continue
            try:
                part = os.read(self._fd, 1 << 16)
            except OSError:  # the terminal is gone with the app
                break
            if not part:
                break
            got += part
            if until is not None and until in got:
                break
        self.output += got
        return got

    def sees(self, words: bytes) -> None:
        """Read until it writes ``words``; a test that waits in vain fails with what it wrote instead."""
        got = self.read(PATIENCE, until=words)
        assert words in got, f"did not happen in time; it wrote\n{got.decode(errors='replace')}"

    def rest(self) -> bytes:
        """What it wrote before it ended."""
        return self.read(PATIENCE)

    def settle(self, silence: float = 0.6, seconds: float = PATIENCE) -> None:
        """Read until it has written nothing for a while: what it had to catch up with is done."""
        deadline = time.monotonic() + seconds
        while self.read(silence) and time.monotonic() < deadline:
            pass

    def frames(self, seconds: float, pause: float = 0.1) -> list[int]:
        """Sizes in bytes of the bursts in so many seconds; silence of ``pause`` ends a burst."""
        sizes: list[int] = []
        last, deadline = 0.0, time.monotonic() + seconds
        while time.monotonic() < deadline:
            got = self.read(0.02)
            now = time.monotonic()
            if got and sizes and now - last < pause:
                sizes[-1] += len(got)
            elif got:
                sizes.append(len(got))
            if got:
                last = now
        return sizes

    def cpu_seconds(self) -> float:
        """Processor time that the app has used."""
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def end(self) -> int | None:
        """Wait for its end; the exit code, negative for a signal."""
        deadline = time.monotonic() + PATIENCE
        while True:
            code = self._process.poll()
            if code is not None:
                return code
            self.read(0.02)
            if time.monotonic() > deadline:
                return None
