"""A configuration as plain values and as TOML: ``config.toml``, from which the same run can start again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

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
    """Like :func:`to_dict`, without the sections of extensions that the run does not use."""
    silent = silent_sections(config)
    return {name: value for name, value in to_dict(config).items() if name not in silent}


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
