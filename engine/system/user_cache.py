"""What is kept for the next run of this user, wherever its runs are."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "EQAT_CACHE_DIR"


def token_cache() -> Path:
    """Where tokenized text is kept: ``$EQAT_CACHE_DIR/tokens``, else in the user's cache directory."""
    from platformdirs import user_cache_dir

    root = os.environ.get(CACHE_VARIABLE)
    return Path(os.path.expanduser(root)) / "tokens" if root else Path(user_cache_dir("eqat")) / "tokens"
