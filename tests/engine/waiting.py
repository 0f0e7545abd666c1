"""Waiting for what other processes do, and for the moment from which they hear a signal.

Which process runs next, and when, is decided by the operating system: on a busy machine a program that starts
in a second takes twenty. So no test waits a fixed time and hopes. It waits until what it needs is there, with
``PATIENCE``, which only bounds how long a failure takes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 180.0
"""Seconds; below the time limit of a test, so that a test that waits in vain says for what."""

NOBODY_ASKS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT)
"""Signals that a process can neither handle nor hold back, whenever they come."""


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Until ``condition`` holds; a test that waits in vain fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def _status(pid: int) -> dict[str, str]:
    """What the kernel says of a process; empty once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _has(mask: str, number: int) -> bool:
    return bool(int(mask, 16) >> (number - 1) & 1)


def hears(pid: int, number: int) -> bool:
    """Whether the signal would reach a handler, be held back or be ignored: one that comes earlier ends the
    process, as it ends every program that is only just starting.

    Python itself handles SIGINT from its first moment, so for a program's own handler ask for another one.
    """
    found = _status(pid)
    return bool(found) and any(_has(found[mask], number) for mask in ("SigCgt", "SigBlk", "SigIgn"))


def handles(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal and does not hold it back."""
    found = _status(pid)
    return bool(found) and _has(found["SigCgt"], number) and not _has(found["SigBlk"], number)


def holds_back(pid: int, number: int) -> bool:
    """Whether the signal would wait until the process is ready for it."""
    found = _status(pid)
    return bool(found) and _has(found["SigBlk"], number)


def waits(pid: int, number: int) -> bool:
    """Whether the signal was sent and has not reached the process yet."""
    found = _status(pid)
    return bool(found) and (_has(found["ShdPnd"], number) or _has(found["SigPnd"], number))


def stands_still(pid: int) -> bool:
    """Whether SIGSTOP has taken effect: the sender of a signal does not wait for that."""
    return _status(pid).get("State", "").startswith("T")
