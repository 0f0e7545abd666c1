"""How many threads a loader gets: the same for each, so that they can be compared."""

from __future__ import annotations

import os

from engine.system.allowance import processors


def threads() -> int:
    """``OMP_NUM_THREADS``, if that is set, else one for each processor that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return processors()
