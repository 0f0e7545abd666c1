"""The integer grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from engine.config import checks
from engine.config.base import Section

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256, -1)


@dataclass(frozen=True)
class Grid:
    """The grid of one linear: what its integers, scales and zero points are."""

    bits: int
    """Bits of an integer, which runs from 0 to ``top``."""
    group_size: int
    """Neighbours along the input that share a scale and a zero point; -1 is the whole row."""
    symmetric: bool = False
    """Every zero point is ``middle``."""

    @property
    def top(self) -> int:
        """The largest integer."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 2 ** (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Groups in a row.

        Raises:
            ValueError: if the group size does not divide ``in_features``.
        """
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            raise ValueError(f"group size {self.group_size} does not divide {in_features} input features")
        return in_features // self.group_size


class GridConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The integer grid (uniform, group-wise)."""

    bits: int = 4
    """A weight takes this many bits: 2, 3, 4 or 8."""
    group_size: int = 64
    """This many weights along the input dimension share a scale; -1 means the whole row."""
    symmetric: bool = False
    """The zero point is fixed at 2^(bits-1) instead of being chosen per group."""
    range: Literal["minmax", "search"] = "search"
    """The initial scale and zero point come from the group's minimum and maximum (``minmax``) or from a
    search over shrunken ranges (``search``)."""
    search_norm: float = 2.5
    """``range = "search"`` minimises |error|^p, and this is p."""

    def check(self, name: str) -> None:
        checks.one_of(f"{name}.bits", self.bits, BITS)
        checks.one_of(f"{name}.group_size", self.group_size, GROUP_SIZES, hint=", where -1 is the whole row")
        # Far above 10 the largest error alone decides, and |error|^p leaves the range of float32.
        checks.between(f"{name}.search_norm", self.search_norm, 0.1, 10.0)

    @property
    def shared(self) -> Grid:
        """The grid of every linear."""
        return Grid(self.bits, self.group_size, self.symmetric)

    def of_each(self, linears: Iterable[str]) -> dict[str, Grid]:
        """The grid of each linear, by name."""
        return dict.fromkeys(linears, self.shared)
