"""The fields of a configuration by their dotted names, as ``--set`` takes them: which there are, what they
take and hold, and which a resumed run may change.

A registered section (:func:`engine.config.run.register_section`) has its fields here like any other.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from typing import Any

from engine.config.base import Section, field_types, is_section
from engine.config.run import RunConfig, run_config
from engine.errors import UsageError


def field_names() -> tuple[str, ...]:
    """Dotted names of all fields."""
    return _names_in(run_config())


@functools.cache
def _names_in(kind: type[RunConfig]) -> tuple[str, ...]:
    return tuple(_leaves(kind, ""))


def _leaves(section: type[Section], prefix: str) -> Iterable[str]:
    for name, kind in field_types(section).items():
        if is_section(kind):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def value_of(config: RunConfig, name: str) -> Any:
    """The value of the field called ``name`` (dotted)."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def field_type(name: str) -> Any:
    """The type of a field.

    Raises:
        UsageError: for a name that no field has, with near ones.
    """
    kind: Any = run_config()
    for part in name.split("."):
        fields = field_types(kind) if is_section(kind) else {}
        if part not in fields:
            raise UsageError("there is no such field", where=name, hint=suggest_field(name))
        kind = fields[part]
    if is_section(kind):
        inside = ", ".join(f"{name}.{field}" for field in field_types(kind))
        raise UsageError("is a section, not a field", where=name, hint=f"set one of {inside}")
    return kind


def is_operational(name: str) -> bool:
    """Whether a resumed run may have another value of this field: it says how a run is carried out and not
    what it computes."""
    *sections, field = name.split(".")
    kind: Any = run_config()
    for section in sections:
        kind = field_types(kind).get(section)
        if not is_section(kind):
            return False
    return not kind.decides(field)


def suggest_field(name: str) -> str:
    """Near names for a wrong one: in its section, else the same field elsewhere, else anything near."""
    known = field_names()
    section, _, last = name.rpartition(".")
    same = [field for field in known if field.rsplit(".", 1)[-1] == last]
    here = {field.rsplit(".", 1)[-1]: field for field in known if field.rpartition(".")[0] == section}
    near = [here[field] for field in difflib.get_close_matches(last, here, n=3, cutoff=0.6)]
    sections = [field for field, kind in field_types(run_config()).items() if is_section(kind)]
    near = near or same or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near[:4])}?" if near else f"fields are in {', '.join(sections)}"


def suggest(wrong: str, known: Iterable[str]) -> str:
    """Near names for a wrong one, as a question; empty without any."""
    near = difflib.get_close_matches(wrong, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else ""
