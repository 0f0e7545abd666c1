"""The end of what an engine printed, for where it died or gives no sign of life."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from engine.run.directory import RunDirectory
from engine.run.launch import log_path
from engine.system.guarded import BadFile, bad_file, open_regular

LOG_LINES = 40
LOG_BYTES = 1 << 14


def log_tail(run: RunDirectory, attempt: int) -> Sequence[str]:
    """The last lines of what the engine printed, in its newest log."""
    logs = sorted(run.logs_dir.glob("attempt-*.log")) if run.logs_dir.is_dir() else []
    log = logs[-1] if logs else log_path(run, max(1, attempt))
    return end_of_file(log, root=run.path)


def end_of_file(path: Path, *, root: Path | None = None) -> list[str]:
    """The last lines of a text file, or why there are none; ``root`` as for
    :func:`~engine.system.guarded.open_regular`."""
    try:
        with os.fdopen(open_regular(path, root=root), "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_BYTES))
            text = file.read(LOG_BYTES).decode(errors="replace")
    except OSError as error:
        return [f"({path.name}: {bad_file(error, path).message})"]
    except BadFile as error:
        return [f"({path.name}: {error.message})"]
    # Here colours and bars of progress are not worth an escape each.
    lines = ["".join(letter if letter.isprintable() else " " for letter in row) for row in text.splitlines()]
    return lines[-LOG_LINES:]
