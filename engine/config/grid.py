"""The integer grid."""

from __future__ import annotations

from typing import Literal

from engine.config import checks
from engine.config.base import Section

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256, -1)


class GridConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The integer grid (uniform, group-wise)."""

    bits: int = 4
    """Bits per weight: 2, 3, 4 or 8."""
    group_size: int = 64
    """Weights along the input dimension that share a scale; -1 means the whole row."""
    symmetric: bool = False
    """Fix the zero point at 2^(bits-1) instead of choosing it per group."""
    range: Literal["minmax", "search"] = "search"
    """Initial scale and zero point: the group's minimum and maximum, or a search over shrunken ranges."""
    search_norm: float = 2.5
    """Exponent p of the |error|^p that ``range = "search"`` minimises."""

    def check(self, name: str) -> None:
        checks.one_of(f"{name}.bits", self.bits, BITS)
        checks.one_of(f"{name}.group_size", self.group_size, GROUP_SIZES, hint=", where -1 is the whole row")
        # Far above 10 the largest error alone decides, and |error|^p leaves the range of float32.
        checks.between(f"{name}.search_norm", self.search_norm, 0.1, 10.0)
