"""A command of ours in a process of its own, which no terminal can end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import PreflightError
from engine.run.launch import python_environment
from engine.system.files import disk_error
from engine.system.guarded import open_regular


def start_detached(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start ``eqat ARGUMENTS`` in a session of its own; what it tells is added to ``log``."""
    try:
        told = open_regular(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, root=log.parent)
    except OSError as error:
        raise disk_error(error, log) from error
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "eqat_tui", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            start_new_session=True,
            env=python_environment(),
        )
    except OSError as error:
        raise PreflightError(f"cannot be started: {error.strerror}", where=sys.executable) from error
    finally:
        os.close(told)
