"""A configuration as plain values and as TOML: ``config.toml``, from which the same run can start again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from engine.config.base import Section
from engine.config.run import RunConfig, silent_sections


def to_toml(config: RunConfig) -> str:
    """``config`` as TOML text. TOML has no null: a field that is ``None`` is left out."""
    import tomli_w

    return tomli_w.dumps(_without_none(essential(config)))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """``config`` as plain dicts, lists, strings and numbers."""
    tree = msgspec.to_builtins(config)
    assert isinstance(tree, dict)
    return tree


def essential(config: RunConfig) -> dict[str, Any]:
    """Like :func:`to_dict`, without the sections of extensions that the run does not use, and without fields
    that are silent where they have their default."""
    silent = silent_sections(config)
    tree = {name: value for name, value in to_dict(config).items() if name not in silent}
    leave_out_defaults(tree, config, lambda section: section.silent())
    return tree


def leave_out_defaults(
    tree: dict[str, Any], section: Section, fields: Callable[[Section], tuple[str, ...]]
) -> None:
    """Take those of the ``fields`` of a section, and of the sections in it, out of its tree that have their
    default."""
    default = type(section)()
    for name in fields(section):
        if getattr(section, name) == getattr(default, name):
            tree.pop(name, None)
    for name, inner in tree.items():
        if isinstance(value := getattr(section, name), Section):
            leave_out_defaults(inner, value, fields)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a configuration tree by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _without_none(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if value is not None
    }
