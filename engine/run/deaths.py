"""Why an engine is gone that has not said so: what it left behind tells, as far as it tells anything.

Its status, which is overwritten in place and so can be written on a full disk too; the end of what it
printed; what its disk looks like now; how its process ended, where that is known. Only where none of these
says anything was it probably killed.
"""

from __future__ import annotations

import errno
import os
import re
import signal

from engine.errors import ExitCode
from engine.run.directory import RunDirectory
from engine.run.launch import log_path
from engine.run.lock import TAKEN
from engine.run.status import read_status
from engine.system.guarded import BadFile
from engine.system.log_bytes import tail

TAIL_BYTES = 1 << 14
KILLED = "killed, or out of host memory"
"""What is left where nothing tells more; the kernel's own log (dmesg) knows."""
FULL = "the disk is full"
LONGEST = 300
QUOTA = "the disk is full: your quota of it is used up"
READ_ONLY = "its file system can only be read"
_PRINTED = [
    (re.compile(pattern, re.IGNORECASE | re.MULTILINE), words)
    for pattern, words in (
        (rf"{os.strerror(errno.ENOSPC)}|\(os error {errno.ENOSPC}\)", FULL),
        (rf"{os.strerror(errno.EDQUOT)}|quota exceeded|\(os error {errno.EDQUOT}\)", QUOTA),
        (os.strerror(errno.EROFS), READ_ONLY),
        (r"CUDA out of memory|OutOfMemoryError", "it ran out of GPU memory"),
        (r"^MemoryError|can't allocate memory|cannot allocate memory", "it ran out of host memory"),
    )
]
_FATAL = re.compile(r"^Fatal Python error: (.+)$", re.M)
_SAID = re.compile(r"^error: (.+)$", re.M)
_RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt)\b.*)$", re.M)
_BY_CODE = {
    ExitCode.PREFLIGHT: "it could not start here",
    ExitCode.OUT_OF_MEMORY: "it ran out of memory",
    ExitCode.DISK_FULL: FULL,
    ExitCode.DATA: "its text could not be used",
    ExitCode.IDENTITY: "it was not the same model, text or configuration any more",
}


def why_gone(run: RunDirectory, attempt: int, *, code: int | None = None, latest: bool = True) -> str:
    """Why the engine of ``attempt`` has ended, in a clause that can follow its name and a colon.

    ``code`` is how its process ended (negative: by that signal), where that is known. Of an attempt that is
    not the ``latest`` only its log counts: what the disk is like has changed since.
    """
    status = read_status(run) if latest else None
    if status is not None and status.attempt == attempt and status.failure:
        return status.failure
    refused = code == ExitCode.PREFLIGHT
    return _printed(run, attempt, refused) or (_disk(run) if latest else "") or _ended(code) or KILLED


def _printed(run: RunDirectory, attempt: int, refused: bool) -> str:
    """What the end of its log says. That somebody else works on the run is why a second engine did not begin,
    one that was ``refused``; it tells nothing of why the first is gone, whose number it may have."""
    try:
        text = tail(log_path(run, attempt), TAIL_BYTES)[0].decode(errors="replace")
    except (OSError, BadFile):
        return ""
    said = [line for line in _SAID.findall(text) if refused or TAKEN not in line]
    if said:
        return str(said[-1])[:LONGEST]
    for pattern, words in _PRINTED:
        if pattern.search(text):
            return words
    fatal = _FATAL.search(text)
    if fatal:
        return f"it crashed ({fatal[1][:LONGEST]})"
    raised = _RAISED.findall(text)
    return f"it ended with {raised[-1][:LONGEST]}" if raised and "Traceback" in text else ""


def _disk(run: RunDirectory) -> str:
    """What stands in the way of every last word."""
    try:
        found = os.statvfs(run.path)
    except OSError as error:
        return f"its folder cannot be read: {error.strerror}"
    if found.f_flag & os.ST_RDONLY:
        return READ_ONLY
    if found.f_bavail == 0:
        return f"{FULL}, so that it could not even say so"
    if found.f_files and found.f_favail == 0:
        return f"{FULL}: it has no room for another file"
    return ""


def _ended(code: int | None) -> str:
    if code is None or code == -signal.SIGKILL:
        return ""
    if code < 0:
        try:
            return f"it was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"it was ended by signal {-code}"
    return _BY_CODE.get(ExitCode(code), "") if code in ExitCode.__members__.values() else ""
