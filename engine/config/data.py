"""Where one text comes from."""

from __future__ import annotations

from engine.config import checks
from engine.config.base import Section
from engine.errors import UsageError

BUILTIN = "builtin"
"""The text that comes with Python (:mod:`engine.data.builtin`): no network, no file."""
OWN = "self"
"""Text that the model writes itself (:mod:`engine.evaluation.own_text`): no network, no file."""
NOT_READ = "belongs to a text that is read, and the model writes its own"
OTHER_TEXT = "leave it out, or name another text"
"""Of a field of a source, beside the model's own text; and what to do."""
OPTIONS = ("subset", "split", "column", "revision")
"""Fields that belong to the source they were written for."""


class DataConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where text comes from."""

    source: str = BUILTIN
    """Text comes from ``builtin``, a shortcut (redpajama, c4, wikitext2, slimpajama, fineweb-edu), a hub id,
    a path, or ``self``, which the model writes."""
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
            if self.is_own and getattr(self, field) is not None:
                raise UsageError(NOT_READ, where=f"{name}.{field}", hint=OTHER_TEXT)

    @property
    def is_own(self) -> bool:
        """Whether the model writes the text itself."""
        return self.source.strip() == OWN
