"""Values as they are typed after ``--set field=`` and shown. Lists have commas between their members, and
where a member holds a comma or a quote itself, they are written as TOML and JSON write a list of texts."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable


def members(text: str) -> list[str]:
    """The members of a list that was typed."""
    text = text.strip()
    if text.startswith("["):
        try:
            written = tomllib.loads(f"list = {text}")["list"]
        except (tomllib.TOMLDecodeError, RecursionError):
            written = None  # brackets around members without quotes
        if isinstance(written, list) and all(isinstance(member, str) for member in written):
            return written
    parts = text.removeprefix("[").removesuffix("]").split(",")
    return [part.strip().strip("\"'") for part in parts if part.strip()]


def list_words(values: Iterable[object]) -> str:
    """A list as :func:`members` reads it."""
    texts = [str(value) for value in values]
    plain = ",".join(texts)
    return plain if members(plain) == texts else json.dumps(texts, ensure_ascii=False)


def value_words(value: object) -> str:
    """A value as ``--set`` takes it and as people read it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return list_words(value)
    return str(value)
