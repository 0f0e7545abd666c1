"""One engine per run: a POSIX record lock on the file ``lock``.

``lockf`` and not ``flock``: a flock belongs to the open file, which forked workers inherit, so it would
stay held after the engine is killed while a worker lives on. A POSIX lock belongs to the process that
took it, dies with it, is visible to others with its owner's pid, and works over NFS.

It has one trap: closing *any* descriptor of the file releases the process's lock. So a process that holds
a lock never opens that file again; it answers questions about it from memory (``_HELD``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import sys
from pathlib import Path
from types import TracebackType

from engine.errors import PreflightError
from engine.system.files import disk_error
from engine.system.guarded import BadFile, open_regular

# Locks this process holds: (device, inode) -> pid that took it. A forked child inherits the table but not
# the locks, which is why the pid is kept.
_HELD: dict[tuple[int, int], int] = {}


class RunLock:
    """Held by the engine from before its first write to its end."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = -1
        self._key = (0, 0)

    def acquire(self) -> None:
        """Take the lock without waiting; :class:`PreflightError` names the process that has it."""
        owner = holder(self.path)
        if owner is not None:
            raise self._taken(owner)
        try:
            fd = open_regular(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise disk_error(error, self.path) from error
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EACCES, errno.EAGAIN):  # someone was faster
                raise self._taken(holder(self.path) or 0) from error
            raise PreflightError(
                f"cannot be locked: {error.strerror}",
                where=str(self.path),
                hint="put the runs on a file system with POSIX locks",
            ) from error
        self._fd = fd
        status = os.fstat(fd)
        self._key = (status.st_dev, status.st_ino)
        _HELD[self._key] = os.getpid()
        try:
            # For readers that cannot ask the kernel. The write also renews the file's time of change,
            # which counts as the first heartbeat of the attempt.
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # a full disk; the lock itself holds

    def release(self) -> None:
        """Give the lock back; nothing happens where it is not held."""
        if self._fd < 0:
            return
        if _HELD.get(self._key) == os.getpid():
            del _HELD[self._key]
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _taken(self, pid: int) -> PreflightError:
        run = self.path.parent
        return already_worked_on(pid, str(run), run.name)


TAKEN = "the run is already being worked on by"


def already_worked_on(pid: int, where: str, run_id: str) -> PreflightError:
    """What is said to a second one that wants to work on a run; ``pid`` is 0 where it is not known."""
    who = f"process {pid}" if pid else "another process"
    return PreflightError(f"{TAKEN} {who}", where=where, hint=f"eqat attach {run_id} follows it")


def holder(path: str | os.PathLike[str]) -> int | None:
    """The pid of the process that holds the lock; 0 when it is unknown (another host); ``None`` if free."""
    held, pid = _probe(Path(path))
    return pid if held else None


def is_held(path: str | os.PathLike[str]) -> bool:
    """Whether any process holds the lock."""
    return _probe(Path(path))[0]


def opened_by(path: str | os.PathLike[str], pid: int) -> bool:
    """Whether process ``pid`` of this machine has the file of a lock open.

    The holder's pid may be that of another host or container, where it means another process than here.
    Whoever wants to signal the holder asks this first.
    """
    import psutil

    try:
        return any(os.path.samefile(file.path, path) for file in psutil.Process(pid).open_files())
    except (psutil.Error, OSError, ValueError):
        return False


def _probe(path: Path) -> tuple[bool, int]:
    try:
        status = os.lstat(path)
        if _HELD.get((status.st_dev, status.st_ino)) == os.getpid():
            return True, os.getpid()
        # Looked at before it is opened: a device may act on being opened.
        fd = open_regular(path) if stat.S_ISREG(status.st_mode) else -1
    except (OSError, BadFile):
        return False, 0
    if fd < 0:
        return False, 0
    try:
        written = _written_pid(fd)
        try:
            locked, pid = _ask_kernel(fd)
        except OSError:  # a file system that cannot be asked: trust the pid in the file while it lives
            return (written > 0 and _alive(written)), written
        # A holder in another container or on another host has no pid here; it wrote its own.
        return locked, pid if pid > 0 else written
    finally:
        os.close(fd)


def _ask_kernel(fd: int) -> tuple[bool, int]:
    """``F_GETLK``: would an exclusive lock on the whole file be refused, and because of whom?"""
    if sys.platform == "darwin":  # struct flock: start, length, pid, type, whence
        layout = "qqihh"
        asked = struct.pack(layout, 0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
        _, _, pid, kind, _ = struct.unpack(layout, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    else:  # type, whence, start, length, pid, padded to the alignment of a 64-bit offset
        layout = "hhqqi0q"
        asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(layout, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return kind != fcntl.F_UNLCK, pid


def _written_pid(fd: int) -> int:
    try:
        return int(os.pread(fd, 32, 0).strip() or 0)
    except (OSError, ValueError):
        return 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # a number that is no process's
        return False
    except OSError:
        return True
    return True
