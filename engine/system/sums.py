"""What a folder holds, as a digest of every file: whether it is still what it was when it was checked."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from engine.system.files import disk_error
from engine.system.guarded import opened_folder, opened_inner, require_regular

PIECE_BYTES = 16 << 20


def digests(
    folder: Path, root: Path | None = None, poll: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """SHA-256 of every file below ``folder``, by its path in it; ``poll`` is called between two pieces.

    Nothing from ``root`` (by default the folder itself) down is reached through a link.

    Raises:
        EqatError: where it cannot be read, or holds something that is neither a file nor a folder.
    """
    found: dict[str, str] = {}
    try:
        with opened_folder(folder, root) as opened:
            _add(opened, "", folder, found, poll)
    except OSError as error:
        raise disk_error(error, folder) from error
    return found


def _add(opened: int, prefix: str, where: Path, found: dict[str, str], poll: Callable[[], None]) -> None:
    for name in sorted(os.listdir(opened)):
        if stat.S_ISDIR(os.stat(name, dir_fd=opened, follow_symlinks=False).st_mode):
            with opened_inner(name, opened) as inner:
                _add(inner, f"{prefix}{name}/", where / name, found, poll)
        else:
            found[f"{prefix}{name}"] = _digest(name, opened, where / name, poll)


def _digest(name: str, opened: int, where: Path, poll: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=opened), "rb") as content:
        require_regular(os.fstat(content.fileno()), where)
        while piece := content.read(PIECE_BYTES):
            digest.update(piece)
            poll()
    return digest.hexdigest()
