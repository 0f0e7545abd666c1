"""A case: a victim, one mutation of it, and what is then done with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from operations import Operation
from oracles import Rules
from world import World


@dataclass(frozen=True)
class Case:
    """One mutation and its consequences."""

    mutation: str
    """What was changed, in words."""
    operations: list[Operation]
    rules: Rules = field(default_factory=Rules)


@dataclass(frozen=True)
class Target:
    """A kind of victim."""

    name: str
    make: Callable[[World, Random], Case]
    """Mutates the world, whose victim is fresh, and says what to do with it."""
    victims: tuple[str, ...]
    """States of the run of which one is drawn for every case."""


def chance_of(target: str, seed: int, number: int) -> Random:
    """The random numbers of a case: the same for the same seed and number."""
    return Random(f"{target} {seed} {number}")
