"""What is written at the end."""

from __future__ import annotations

from typing import Literal

from engine.config.base import Section


class ExportConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which packed checkpoints are written at the end."""

    formats: tuple[Literal["gptq_v2"], ...] = ("gptq_v2",)
    """Layouts of the packed checkpoint; none writes nothing."""
    shard_gib: float = 4.0
    """Largest safetensors file, GiB."""
