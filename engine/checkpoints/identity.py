"""What a checkpoint depends on, by field, and when a run may continue one.

The identity is written into every generation: the settings that decide what is computed, and digests of the
model and of the text. A run continues a checkpoint only if every field agrees, and is told the first that
does not.

Versions add settings. A checkpoint from before there was a setting was made as this version makes it with the
setting's default value, or else the setting would have changed what it means to leave it out. So a setting
that the stored identity lacks counts as its default, and the run goes on if that is what it has. The other
way round nothing is assumed: of a field that is stored and that this version does not know (of a later
version, of an extension that is not loaded) nobody here can say what it decided.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from engine.config.loading import apply_overrides, is_operational, resolve, to_dict, value_of
from engine.config.run import RunConfig


def deciding_fields(config: RunConfig) -> dict[str, str]:
    """The settings a checkpoint depends on, by name: all but labels and what is operational."""

    def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", json.dumps(value)

    return {
        name: value
        for name, value in flat(to_dict(config))
        if name not in ("name", "description") and not is_operational(name)
    }


def default_fields(config: RunConfig) -> dict[str, str]:
    """The default of each deciding setting, by name; what follows from others follows from those of
    ``config``."""
    default = type(config)()

    def resolved(name: str) -> Any:
        return value_of(resolve(apply_overrides(config, {name: value_of(default, name)})), name)

    return {name: json.dumps(resolved(name)) for name in deciding_fields(config)}


def differing_field(
    there: Mapping[str, str],
    here: Mapping[str, str],
    defaults: Mapping[str, str],
    *,
    beginning: tuple[str, ...] = ("",),
) -> str | None:
    """The first field, among those whose name begins so, in which a stored identity differs from a run's.

    ``defaults`` says what a field counts as that the stored one lacks; see the top of this file.
    """
    names = [*here, *(name for name in there if name not in here)]
    wanted = (name for name in names if name.startswith(beginning))
    return next((name for name in wanted if stored(there, name, defaults) != here.get(name)), None)


def stored(there: Mapping[str, str], name: str, defaults: Mapping[str, str]) -> str | None:
    """What a checkpoint was made with; none where nobody knows."""
    return there.get(name, defaults.get(name))
