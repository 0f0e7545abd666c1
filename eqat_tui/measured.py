"""Which of a run's measurements and texts stands for what the run made, and in which colour one is shown.

A log may speak of stages that are not known here: of a newer version, or of an extension that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from engine.config.stages import STAGES, newest_first, versions

Value = TypeVar("Value")

OF_BLOCKS = "series3"
"""Of every method that makes blocks: no two of them are in one run."""
COLOURS = ("series2", "series1", "series4")
"""Of the other quantized stages, in the order of the table; then from the first one again."""


def newest(values: Mapping[str, Value | None]) -> Value | None:
    """Of what there is by stage, that of the quantized version that came last.

    A version that is not known here is none of the baselines, which every run has, so it counts for more.
    """
    known = versions()
    unknown = [name for name in versions(values) if name not in known]
    found = (values.get(name) for name in (*reversed(unknown), *newest_first()))
    return next((value for value in found if value is not None), None)


def colour_of(stage: str) -> str:
    """The role in which a version is drawn; none for one that is not known here."""
    if stage not in STAGES:
        return ""
    if STAGES[stage].scope == "nothing":
        return "muted"
    others = [row.name for row in STAGES if row.scope == "network" or (row.scope == "block" and row.baseline)]
    return COLOURS[others.index(stage) % len(COLOURS)] if stage in others else OF_BLOCKS
