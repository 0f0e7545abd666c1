"""What each field of the configuration means, in the words of its own docstring.

The text under a field of a section is not kept by Python, so it is read from the source of the section's
file: one owner for every meaning, whether it is read in the code or on a screen.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Mapping

from engine.config.base import Section, field_types, is_section
from engine.config.run import RunConfig, run_config


def field_help() -> Mapping[str, str]:
    """The meaning of every field, by its dotted name, each on one line."""
    return _help_of(run_config())


@functools.cache
def _help_of(config: type[RunConfig]) -> Mapping[str, str]:
    return dict(_walk(config, ""))


def _walk(section: type[Section], prefix: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, kind in field_types(section).items():
        if is_section(kind):
            found += _walk(kind, f"{prefix}{name}.")
            continue
        found.append((prefix + name, _texts(section).get(name, "").replace("``", "")))
    return found


@functools.cache
def _texts(section: type[Section]) -> Mapping[str, str]:
    """The string that follows each annotated field of a section and of what it extends."""
    texts: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if is_section(kind):
            texts |= _own_texts(kind)
    return texts


def _own_texts(section: type[Section]) -> Mapping[str, str]:
    """Those that a class names itself, of one without a source none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
    except (OSError, TypeError):
        return {}
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    texts = {}
    for field, after in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            texts[field.target.id] = " ".join(str(after.value.value).split())
    return texts
