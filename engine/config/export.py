"""What is written at the end."""

from __future__ import annotations

from typing import Annotated

from engine.config.base import Section
from engine.config.formats import DEFAULT_FORMAT, FORMATS


class ExportConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which packed checkpoints are written at the end."""

    formats: tuple[Annotated[str, FORMATS], ...] = (DEFAULT_FORMAT,)
    """Layouts of the packed checkpoint; none writes nothing."""
    shard_gib: float = 4.0
    """Largest safetensors file, GiB."""
