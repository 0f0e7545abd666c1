"""Which model a run quantizes."""

from __future__ import annotations

from engine.config import checks
from engine.config.base import Section


class ModelConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model is quantized."""

    source: str = ""
    """Local directory, hub id, ``.gguf`` file, ``package://NAME/FILE`` or ``random://tiny-llama``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; none means the default branch."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. Only for repositories you have read."""

    def check(self, name: str) -> None:
        checks.text(f"{name}.source", self.source, hint="--model takes a directory, a hub id or a .gguf file")
        checks.optional_text(f"{name}.revision", self.revision)
