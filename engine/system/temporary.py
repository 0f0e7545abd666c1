"""What files are called while they are written."""

from __future__ import annotations

import os
import re

_TEMPORARY = re.compile(r"\.(.+)\.[0-9]{1,10}\.[0-9a-f]{8}\.tmp", re.DOTALL)


def unique(size: int) -> str:
    """So many random bytes as hexadecimal digits, for a name that nobody else may have. What Python's
    ``secrets`` loads for the same costs a command a twentieth of its time."""
    return os.urandom(size).hex()


def temporary_name(name: str) -> str:
    """What a file is called while it is written, before it is renamed to ``name``. Unique: two threads (or an
    engine and a command) may write the same file at once."""
    return f".{name}.{os.getpid()}.{unique(4)}.tmp"


def temporary_of(name: str) -> str:
    """The file that the temporary file ``name`` was to become; empty for any other file."""
    match = _TEMPORARY.fullmatch(name)
    return match[1] if match else ""
