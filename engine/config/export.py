"""What is written at the end."""

from __future__ import annotations

from typing import Annotated

from engine.config import checks
from engine.config.base import ComputeDtype, Section
from engine.config.formats import DEFAULT_FORMAT, FORMATS, refuse_unknown


class ExportConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which packed checkpoints are written at the end."""

    formats: tuple[Annotated[str, FORMATS], ...] = (DEFAULT_FORMAT,)
    """The packed checkpoint is written in each of these layouts; none writes nothing."""
    dtype: ComputeDtype = "auto"
    """What is not quantized is stored and declared in this type; auto takes the original's, and bfloat16 (of
    the same range, in half the space) for float32."""
    shard_gib: float = 4.0
    """A safetensors file takes at most this many GiB."""

    def check(self, name: str) -> None:
        refuse_unknown(f"{name}.formats", self.formats)
        checks.unique(f"{name}.formats", self.formats)
        # A file has a header; below a KiB there would be more files than a folder can hold.
        checks.between(f"{name}.shard_gib", self.shard_gib, 1e-6, 1e6)

    @classmethod
    def decides(cls, field: str) -> bool:
        return False  # it writes what was computed
