"""What is kept for the next run of this user, wherever its runs are."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "EQAT_CACHE_DIR"


def token_cache() -> Path:
    """Where tokenized text is kept: ``$EQAT_CACHE_DIR/tokens``, else in the user's cache directory."""
    return _root() / "tokens"


def attached_cache() -> Path:
    """Where copies of other machines' runs lie while they are shown."""
    return _root() / "attached"


def _root() -> Path:
    from platformdirs import user_cache_dir

    root = os.environ.get(CACHE_VARIABLE)
    return Path(os.path.expanduser(root)) if root else Path(user_cache_dir("eqat"))
