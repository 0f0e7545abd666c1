"""What a checkpoint depends on, by field, and when a run may continue one.

The identity is written into every generation: the settings that decide what is computed, and digests of the
model and of the text. A run continues a checkpoint only if every field agrees, and is told the first that
does not.

Versions add settings. A checkpoint from before there was a setting was made as this version makes it with the
setting's default value, or with the one that its section names (:meth:`~engine.config.base.Section.earlier`).
So a setting that the stored identity lacks counts as that, and the run goes on if that is what it has.
Settings of an extension that a run does not use are never stored, so it goes on with and without the
extension. Of a stored field that this version does not know nothing is assumed, since nobody here can say
what it decided.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.config.derived import resolve
from engine.config.fields import is_operational, value_of
from engine.config.loading import as_earlier
from engine.config.overrides import apply_overrides
from engine.config.run import LABELS, RunConfig
from engine.config.writing import essential, flat, to_dict


def deciding_fields(config: RunConfig) -> dict[str, str]:
    """The settings a checkpoint depends on, by name: all but labels and what is operational."""
    return {name: json.dumps(value) for name, value in _deciding(essential(config)).items()}


def default_fields(config: RunConfig) -> dict[str, str]:
    """What each deciding setting is in a checkpoint that lacks it, by name: its default, or what versions
    without it did; what follows from others follows from those of ``config``."""
    default = as_earlier(type(config)())

    def resolved(name: str) -> Any:
        return value_of(resolve(apply_overrides(config, {name: value_of(default, name)})), name)

    return {name: json.dumps(resolved(name)) for name in _deciding(to_dict(config))}


def _deciding(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in flat(tree).items() if name not in LABELS and not is_operational(name)
    }


def differing_field(
    there: Mapping[str, str],
    here: Mapping[str, str],
    defaults: Mapping[str, str],
    *,
    beginning: tuple[str, ...] = ("",),
) -> str | None:
    """The first field, among those whose name begins so, in which a stored identity differs from a run's.

    ``defaults`` says what a field counts as that one of them lacks; see the top of this file.
    """
    names = [*here, *(name for name in there if name not in here)]

    def agrees(name: str) -> bool:
        return counts_as(there, name, defaults) == counts_as(here, name, defaults)

    return next((name for name in names if name.startswith(beginning) and not agrees(name)), None)


def counts_as(identity: Mapping[str, str], name: str, defaults: Mapping[str, str]) -> str | None:
    """What a field is in an identity; none where nobody knows."""
    return identity.get(name, defaults.get(name))
