"""The state of a training, from which it continues exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Snapshot(NamedTuple):
    """The state of a training: tensors by name, and values that JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @classmethod
    def join(cls, parts: Mapping[str, Snapshot]) -> Snapshot:
        """Several as one; each part's names begin with its prefix."""
        tensors = {prefix + name: t for prefix, part in parts.items() for name, t in part.tensors.items()}
        facts = {prefix + name: f for prefix, part in parts.items() for name, f in part.facts.items()}
        return cls(tensors, facts)

    def part(self, prefix: str) -> Snapshot:
        """The part that was joined under ``prefix``."""
        cut = len(prefix)
        tensors = {name[cut:]: value for name, value in self.tensors.items() if name.startswith(prefix)}
        facts = {name[cut:]: value for name, value in self.facts.items() if name.startswith(prefix)}
        return Snapshot(tensors, facts)
