"""The integer grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from engine.config import checks
from engine.config.base import Section
from engine.errors import UsageError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256, -1)
HEAD_BITS = (0, 4, 8)
"""Of the embedding and the output head; 0 leaves them as numbers."""


@dataclass(frozen=True)
class Grid:
    """The grid of one linear: what its integers, scales and zero points are."""

    bits: int
    """Bits of an integer, which runs from 0 to ``top``."""
    group_size: int
    """Neighbours along the input that share a scale and a zero point; -1 is the whole row."""
    symmetric: bool = False
    """Every zero point is ``middle``."""
    fixed_zero_point: int | None = None
    """Every zero point is this number; none where each group has its own."""
    turns: bool = field(default=False, compare=False)
    """Whether a group may begin with a scale below zero, which turns its levels round: with a zero point of 1
    at 2 bits it has -2 to 1 of them where the others have -1 to 2. It is the same grid afterwards."""

    def __post_init__(self) -> None:
        """Symmetric and fixed in the middle are one grid, however it was asked for.

        Raises:
            ValueError: for a zero point that is not that of a symmetric grid, or leaves no integer on one of
                its sides; for groups that would turn round about a zero point that is not next to the middle.
        """
        fixed = self.fixed_zero_point
        if self.symmetric and fixed is None:
            object.__setattr__(self, "fixed_zero_point", self.middle)
        elif self.symmetric and fixed != self.middle:
            raise ValueError(f"the zero point of a symmetric grid of {self.bits} bits is not {fixed}")
        elif fixed is not None:
            if not 0 < fixed < self.top:
                raise ValueError(f"{fixed} is no zero point between 0 and {self.top}")
            object.__setattr__(self, "symmetric", fixed == self.middle)
        if self.turns and self.fixed_zero_point not in (self.middle - 1, self.middle):
            raise ValueError(f"groups do not turn round about {self.fixed_zero_point}")

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


def held_zero_point(bits: int) -> int:
    """The zero point that ``zero_point = "fixed"`` holds.

    It is the one of the block types of GGUF, ``(q - 1) * d`` at 2 bits and ``(q - 8) * d`` at 4, and in all
    widths but 2 that of a symmetric grid.
    """
    return 1 if bits == 2 else 2 ** (bits - 1)


class GridConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The integer grid (uniform, group-wise)."""

    bits: int = 4
    """A weight takes this many bits: 2, 3, 4 or 8."""
    group_size: int = 64
    """This many weights along the input dimension share a scale; -1 means the whole row."""
    symmetric: bool = False
    """The zero point is fixed at 2^(bits-1), at 2 bits too, instead of being chosen per group."""
    zero_point: Literal["learned", "fixed"] = "learned"
    """A zero point is ``learned`` for each group, or ``fixed``: 1 at 2 bits (GGUF Q2_0), else 2^(bits-1)
    (Q4_0, Q8_0); a scale below zero then turns a group's levels round."""
    range: Literal["minmax", "search"] = "search"
    """The initial scale and zero point come from the group's minimum and maximum (``minmax``) or from a
    search over shrunken ranges (``search``)."""
    search_norm: float = 2.5
    """``range = "search"`` minimises |error|^p, and this is p."""
    head_bits: int = 0
    """Input embedding and output head are rounded to 4 or 8 bits a weight, in groups; 0 leaves them as 16-bit
    numbers, and training always reads those."""

    def check(self, name: str) -> None:
        checks.one_of(f"{name}.bits", self.bits, BITS)
        checks.one_of(f"{name}.group_size", self.group_size, GROUP_SIZES, hint=", where -1 is the whole row")
        checks.one_of(f"{name}.head_bits", self.head_bits, HEAD_BITS, hint=", where 0 is 16-bit numbers")
        held = held_zero_point(self.bits)
        if self.symmetric and self.zero_point == "fixed" and held != self.shared.middle:
            raise UsageError(
                f"is {held} where it is fixed at {self.bits} bits, on a symmetric grid {self.shared.middle}",
                where=f"{name}.zero_point",
                hint=f"{name}.symmetric = false, or {name}.zero_point = learned",
            )
        # Far above 10 the largest error alone decides, and |error|^p leaves the range of float32.
        checks.between(f"{name}.search_norm", self.search_norm, 0.1, 10.0)

    @classmethod
    def younger(cls) -> tuple[str, ...]:
        return ("zero_point", "head_bits")

    @classmethod
    def silent(cls) -> tuple[str, ...]:
        return ("head_bits",)

    @property
    def shared(self) -> Grid:
        """The grid of every linear."""
        return self._of(self.bits, self.symmetric)

    @property
    def head(self) -> Grid | None:
        """The grid of embedding and head; none where they stay numbers.

        At 8 bits it is symmetric: with 256 steps a zero point of its own gives a group nothing, and formats
        that have no place for one hold it exactly. At 4 bits it has zero points like the linears.
        """
        if not self.head_bits:
            return None
        return self._of(self.head_bits, self.symmetric or self.head_bits == 8)

    def _of(self, bits: int, symmetric: bool) -> Grid:
        held = self.zero_point == "fixed" and not symmetric
        return Grid(bits, self.group_size, symmetric, held_zero_point(bits) if held else None, turns=held)

    @property
    def fixes_zero_points(self) -> bool:
        """Whether there are no zero points to choose and to train."""
        return self.symmetric or self.zero_point == "fixed"

    def of_each(self, linears: Iterable[str]) -> dict[str, Grid]:
        """The grid of each linear, by name."""
        return dict.fromkeys(linears, self.shared)
