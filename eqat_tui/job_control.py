"""What the shell that this program was started from does with it: Ctrl-Z, ``fg``, ``bg``."""

from __future__ import annotations

import os
from typing import TextIO


def shell_waits() -> bool:
    """Whether a shell would take the terminal while this process is stopped, and could go on with it.

    A program that a terminal, ``ssh -t`` or a container was opened for has none: stopped, it would stay so,
    and nothing that is typed there would be heard. By this rule the kernel ignores Ctrl-Z for other programs.
    """
    import psutil

    group = os.getpgrp()
    try:
        parent = psutil.Process(group).ppid() if group != os.getpid() else os.getppid()
        return os.getpgid(parent) != group and os.getsid(parent) == os.getsid(0)
    except (psutil.Error, OSError):
        return False


def in_foreground(stream: TextIO | None) -> bool:
    """Whether what this process writes to a terminal is what its user looks at; true without job control."""
    try:
        return stream is None or os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return True
