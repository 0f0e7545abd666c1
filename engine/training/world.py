"""Which of several processes that train one model together this one is."""

from __future__ import annotations

from typing import NamedTuple


class World(NamedTuple):
    """Which of how many processes that train one model together this one is."""

    rank: int = 0
    size: int = 1


ALONE = World()
