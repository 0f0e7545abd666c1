"""How long a text a model can read at all.

Rotary embeddings and slopes (ALiBi) are computed for any position: a text longer than those a model was
trained on makes it worse, and deserves a warning. A table of positions has so many rows and no more: reading
on is an error in the middle of a run, on a GPU one that nobody can explain. So it is known before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.architecture.family_table import ALIASES, FAMILIES
from engine.errors import PreflightError

POSITIONS = "max_position_embeddings"
_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|positions_embed|pos_emb\w*)\.weight$")
_ELSEWHERE = re.compile(r"vision|audio|visual|encoder\.layers")


class PositionTable(msgspec.Struct, frozen=True):
    """A model's table of positions."""

    field: str
    """Of the configuration, that says how many there are."""
    rows: int

    def refusal(self, where: str, length: int) -> PreflightError:
        """What is said of a text of ``length`` tokens, which the field ``where`` asks for."""
        return PreflightError(
            f"{length} tokens do not fit into the model's table of {self.rows} positions ({self.field})",
            where=where,
            hint=f"set {where} = {self.rows} or less",
        )


def position_table(
    text: Mapping[str, Any], shapes: Mapping[str, Sequence[int]] | None = None
) -> PositionTable | None:
    """The table of a model's positions; None where it has none.

    Known families say it in their row; of others the names of their weights do, where ``shapes`` has them.
    """
    family = FAMILIES.get(str(text.get("model_type") or ""))
    if family is not None:
        field = family.position_table
        rows = _number(text, field) or family.defaults.get(POSITIONS) if field else None
        return PositionTable(field, rows) if rows else None
    for name, shape in (shapes or {}).items():
        if len(shape) == 2 and _TABLE.search(name) and not _ELSEWHERE.search(name):
            # Some tables begin with rows for padding, so that the field is the smaller number.
            return PositionTable(POSITIONS, min(_number(text, POSITIONS) or shape[0], shape[0]))
    return None


def _number(text: Mapping[str, Any], field: str) -> int | None:
    """The field, by whichever of its names."""
    names = (field, POSITIONS, *ALIASES[POSITIONS])
    found = (text.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
