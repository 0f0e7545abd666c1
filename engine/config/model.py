"""Which model a run quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from engine.config import checks
from engine.config.base import Section

BeginOfText = Literal["auto", "text", "always", "never"]

RANDOM, PACKAGE = "random://", "package://"
"""Begin a source that is made up, and one that is a file of an installed Python package."""
TINY_MODEL = f"{RANDOM}tiny-llama"
"""The model that needs no download and no file: to try things out."""


class ModelConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model is quantized."""

    source: str = ""
    """The model is a local directory, a hub id, a ``.gguf`` file, ``package://NAME/FILE`` or ``random://tiny-
    llama``."""
    revision: str | None = None
    """The hub id is taken at this branch, tag or commit; none takes the default branch."""
    trust_remote_code: bool = False
    """Python code that the model repository ships is run; read the repository before you allow it."""
    bos: BeginOfText = "auto"
    """A begin-of-text token starts each sequence: auto where the tokenizer writes one, always, never, or
    text: once before a whole text."""

    def check(self, name: str) -> None:
        checks.text(f"{name}.source", self.source, hint="--model takes a directory, a hub id or a .gguf file")
        checks.optional_text(f"{name}.revision", self.revision)

    @classmethod
    def earlier(cls) -> Mapping[str, Any]:
        # Versions without the field wrote the token where the tokenizer does, and cut windows afterwards.
        return {"bos": "text"}
