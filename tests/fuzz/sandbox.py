"""One operation in a process of its own: forked with the engine imported, limited, watched and without a net.

Importing the engine takes five seconds and an operation a tenth of one; so whoever calls this has imported
everything and computed nothing (threads do not survive a fork).
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MEMORY = 3 << 30
"""Bytes that an operation may map beyond what the imports did."""
LARGEST_FILE = 256 << 20

SPAWNS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn"}
NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
HARMLESS = {"uname", "lscpu", "nvidia-smi", os.path.basename(sys.executable)}
"""Programs that libraries ask about the machine, and the one that operations are."""


@dataclass(frozen=True)
class Ended:
    """How an operation went."""

    code: int
    """Its exit code; negative for the signal that killed it."""
    stdout: bytes
    stderr: bytes
    seconds: float
    late: bool
    """It had not ended when its time was over."""
    peak: int
    """Bytes of memory it held at most."""
    noticed: tuple[str, ...]
    """What it tried and no operation should: programs, connections, pickles."""


def run_limited(
    action: Callable[[], Any], scratch: Path, environment: dict[str, str], folder: Path, cpu: int, wall: float
) -> Ended:
    """Run ``action`` in a forked process, which has ``cpu`` seconds of processor time and ``wall`` seconds.

    ``action`` returns its exit code or replaces the process by a program.
    """
    scratch.mkdir(exist_ok=True)
    names = [scratch / name for name in ("stdout", "stderr", "noticed")]
    out, err, noticed = (os.open(n, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) for n in names)
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    child = os.fork()
    if not child:
        _be_the_child(action, (out, err, noticed), environment, folder, cpu)
    for fd in (out, err, noticed):
        os.close(fd)
    late = not _ended(child, wall)
    if late:
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    try:
        os.killpg(child, signal.SIGKILL)  # what it left running
    except ProcessLookupError:
        pass
    return Ended(
        code=os.waitstatus_to_exitcode(status),
        stdout=names[0].read_bytes(),
        stderr=names[1].read_bytes(),
        seconds=time.monotonic() - began,
        late=late,
        peak=usage.ru_maxrss * 1024,
        noticed=tuple(sorted(set(names[2].read_text().splitlines()))),
    )


def _ended(child: int, seconds: float) -> bool:
    fd = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(fd)


def _be_the_child(
    action: Callable[[], Any],
    files: tuple[int, int, int],
    environment: dict[str, str],
    folder: Path,
    cpu: int,
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(files[0], 1)
        os.dup2(files[1], 2)
        # As Python makes them for a user whose locale is UTF-8.
        sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8")
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace")
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        _limit(cpu)
        sys.addaudithook(_notice_into(files[2]))
        result = action()
        code = result if isinstance(result, int) else 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _limit(cpu: int) -> None:
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _notice_into(fd: int) -> Callable[[str, tuple[Any, ...]], None]:
    def notice(event: str, arguments: tuple[Any, ...]) -> None:
        if event in SPAWNS:
            program = os.path.basename(str(arguments[0]))
            if program not in HARMLESS:
                os.write(fd, f"executed {event} {str(arguments[:2])[:200]!r}\n".encode())
        elif event in NETWORK:
            if event == "socket.connect" and isinstance(arguments[1], str | bytes):
                return  # a Unix socket
            os.write(fd, f"network {event} {str(arguments[1:2])[:200]!r}\n".encode())
            raise OSError(101, "Network is unreachable")
        elif event == "pickle.find_class":
            os.write(fd, f"executed {event} {arguments!r}\n".encode())

    return notice
