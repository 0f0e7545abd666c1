"""What outlives this user's programs on this machine, wherever runs are kept."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

STATE_VARIABLE = "EQAT_STATE_DIR"


def queue_folder() -> Path:
    """The queue of this machine: in ``$EQAT_STATE_DIR``, else in the user's folder for what programs keep.

    Homes are shared by machines, and each has a queue of its own.
    """
    from platformdirs import user_state_dir

    root = os.environ.get(STATE_VARIABLE)
    place = Path(os.path.expanduser(root) if root else user_state_dir("eqat"))
    return place / "queue" / machine_name()


def machine_name() -> str:
    """This machine's name, as a folder may be called."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname()).strip("-.") or "machine"
