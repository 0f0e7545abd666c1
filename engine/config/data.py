"""Where one text comes from."""

from __future__ import annotations

from engine.config import checks
from engine.config.base import Section

BUILTIN = "builtin"
"""The text that comes with Python (:mod:`engine.data.builtin`): no network, no file."""
OPTIONS = ("subset", "split", "column", "revision")
"""Fields that belong to the source they were written for."""


class DataConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where text comes from."""

    source: str = BUILTIN
    """Text comes from ``builtin``, a shortcut (redpajama, c4, wikitext2, slimpajama, fineweb-edu), a hub id,
    or a path."""
    subset: str | None = None
    """The hub data set is read in the configuration of this name."""
    split: str | None = None
    """Text is taken from this split of a hub data set; ``builtin`` and local text know their parts and take
    none."""
    column: str | None = None
    """This column holds the text; none means ``text``."""
    revision: str | None = None
    """The hub data set is read at this branch, tag or commit."""

    def check(self, name: str) -> None:
        checks.text(f"{name}.source", self.source, hint="builtin, a shortcut such as c4, a hub id, or a path")
        for field in OPTIONS:
            checks.optional_text(f"{name}.{field}", getattr(self, field))
