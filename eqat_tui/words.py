"""What the parts of a run are called when they are shown to a person."""

from __future__ import annotations

from typing import Any

from engine.errors import EqatError


def model_name(source: Any) -> str:
    """The last part of a model's source, as people say it."""
    name = source.rstrip("/").rsplit("/", 1)[-1] if isinstance(source, str) else ""
    return name.removesuffix(".gguf") or "?"


def hint_for_app(hint: str) -> str:
    """A hint in brackets; one that speaks of flags and commands is of no use where there are keys."""
    return f" ({hint})" if hint and "--" not in hint and not hint.startswith("eqat ") else ""


def error_for_app(error: EqatError) -> str:
    """Where, what, and what to do about it there."""
    where = f"{error.where}: " if error.where else ""
    return f"{where}{error.message}{hint_for_app(error.hint)}"
