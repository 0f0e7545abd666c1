"""A run whose blocks come out of somebody's quantized checkpoint."""

from __future__ import annotations

from engine.config import checks
from engine.config.stage_section import StageSection


class ImportedConfig(StageSection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Blocks out of a quantized checkpoint, as ``eqat import`` makes a run of one."""

    enabled: bool = False
    """``model.source`` is a quantized checkpoint, whose integers, scales and zero points become the run's
    blocks."""
    reference: str = ""
    """The checkpoint was made from this model, a local directory or a hub id, which is measured as full
    precision and teaches; empty where it is not at hand."""

    def check(self, name: str) -> None:
        if self.reference:
            checks.text(f"{name}.reference", self.reference)

    @property
    def lacks_original(self) -> bool:
        """Whether there is no model in full precision to be measured, or to learn from."""
        return self.enabled and not self.reference
