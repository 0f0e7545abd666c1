"""Where text comes from."""

from __future__ import annotations

from engine.config.base import Section

BUILTIN = "builtin"
"""The text that comes with Python (:mod:`engine.data.builtin`): no network, no file."""


class DataConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where text comes from."""

    source: str = BUILTIN
    """``builtin``, a shortcut (redpajama, c4, wikitext2, slimpajama, fineweb-edu), a hub id, or a path."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str | None = None
    """Split of a hub data set; ``builtin`` and local text know their parts and take none."""
    column: str | None = None
    """Column that holds the text; none means ``text``."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
