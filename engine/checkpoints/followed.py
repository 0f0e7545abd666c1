"""A run's checkpoint as the other ranks see it: read where a tensor is wanted, written by the first alone.

What a rank publishes itself is what the first rank publishes at the same moment, so nothing happens then but
that the name is known. What it is to read, the first rank says (:meth:`FollowedStore.take`) before each thing
that is done together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from engine.checkpoints.store import CheckpointStore, Committed
from engine.run.generations import Generation


class Contents(NamedTuple):
    """What a store holds: names of objects by entry, and facts."""

    number: int
    entries: dict[str, str]
    facts: dict[str, Any]


def contents_of(store: CheckpointStore) -> Contents:
    """To be told to the other ranks."""
    current = store.current
    return Contents(current.number, dict(current.entries), dict(current.facts))


class FollowedStore(CheckpointStore):
    """Of a rank that is not the first."""

    def __init__(self, directory: Path, identity: Mapping[str, str], contents: Contents) -> None:
        self.directory, self.identity, self.damage = directory, dict(identity), ""
        self.defaults, self._may_differ = {}, ()
        self.take(contents)

    def take(self, contents: Contents) -> None:
        """From now on the store holds this."""
        self._current = Generation(contents.number, dict(contents.entries), dict(contents.facts))

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._current.entries[name] = ""

    def commit(self) -> Committed:
        return Committed(self._current.number, 0, 0.0)
