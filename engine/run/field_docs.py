"""What each field of the configuration means, in the words of its own docstring.

The text under a field in :mod:`engine.run.schema` is not kept by Python, so it is read from that file's
source: one owner for every meaning, whether it is read in the code or on a screen.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from engine.run import schema
from engine.run.schema import RunConfig, field_types, is_section


@functools.lru_cache(1)
def field_help() -> dict[str, str]:
    """The meaning of every field, by its dotted name, each on one line."""
    texts = _texts()
    return dict(_walk(RunConfig, "", texts))


def _walk(
    section: type[schema.Section], prefix: str, texts: dict[str, dict[str, str]]
) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, kind in field_types(section).items():
        if is_section(kind):
            found += _walk(kind, f"{prefix}{name}.", texts)
            continue
        text = texts[section.__name__].get(name, "")
        reference = re.fullmatch(r"As in ``(\w+)``\.", text)
        if reference:
            text = texts[field_types(RunConfig)[reference[1]].__name__].get(name, "")
        found.append((prefix + name, text.replace("``", "")))
    return found


def _texts() -> dict[str, dict[str, str]]:
    """The string that follows each annotated field, by class and field."""
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    texts: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        own = texts.setdefault(node.name, {})
        for field, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                own[field.target.id] = " ".join(str(after.value.value).split())
    return texts
