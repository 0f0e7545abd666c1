"""What is kept for the next run of this user, wherever its runs are."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

CACHE_VARIABLE = "EQAT_CACHE_DIR"


def token_cache() -> Path:
    """Where tokenized text is kept: ``$EQAT_CACHE_DIR/tokens``, else in the user's cache directory."""
    return _root() / "tokens"


def attached_cache() -> Path:
    """Where copies of other machines' runs lie while they are shown."""
    return _root() / "attached"


def publish(path: Path, data: bytes) -> None:
    """Put a file into a cache: a reader, or another run writing the same entry, sees all of it or none.

    Raises:
        OSError: where that is not possible; what was there stays.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:12]}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _root() -> Path:
    from platformdirs import user_cache_dir

    root = os.environ.get(CACHE_VARIABLE)
    return Path(os.path.expanduser(root)) if root else Path(user_cache_dir("eqat"))
