"""Settings on top of a configuration: ``--set section.field=value``, and one layer of values on another."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.config.base import describe
from engine.config.data import OPTIONS
from engine.config.evaluation import texts_tree
from engine.config.fields import field_type
from engine.config.lists import members
from engine.config.run import RunConfig
from engine.config.validation import convert
from engine.config.writing import to_dict
from engine.errors import UsageError

# A revision, split or column, and above all the trust in its code, belongs to the source it was written
# for. Where a layer (a file that extends another, a flag) names another source, these go back to their
# defaults unless the layer gives them too.
TEXTS = "evaluation.data"
"""The section of one text, that also takes a list of them."""
_BELONGS_TO_SOURCE = ("trust_remote_code", *OPTIONS)


def apply_overrides(config: RunConfig, overrides: Mapping[str, object]) -> RunConfig:
    """``config`` with ``{"block_ap.epochs": "3", ...}`` set.

    Strings are read as the field's type wants them (``none`` for a field that may be left out, commas
    between the members of a list); other values are taken as they are. Giving ``data.source`` another
    value drops the split, column and revision that belonged to the old one, unless given as well; giving
    ``data.mix`` drops the source, and giving a source drops the mixture. ``evaluation.data`` takes the texts
    that are measured, one or several.
    """
    layer: dict[str, Any] = {}
    for name, value in _one_by_one(overrides).items():
        *sections, field = name.strip().split(".")
        kind = field_type(name.strip())
        node = layer
        for section in sections:
            node = node.setdefault(section, {})
        node[field] = _read_value(name.strip(), kind, value) if isinstance(value, str) else value
    return convert(merge(to_dict(config), layer))


def _one_by_one(overrides: Mapping[str, object]) -> dict[str, object]:
    """``overrides`` with what is written in one word for several fields in the place of each of them."""
    found: dict[str, object] = {}
    for name, value in overrides.items():
        if name.strip() != TEXTS:
            found[name] = value
            continue
        texts = members(value) if isinstance(value, str) else value
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise UsageError("is no list of texts", where=TEXTS, hint="like wikitext2,c4")
        tree = texts_tree([str(text) for text in texts])
        found |= {f"{TEXTS}.{field}": given for field, given in tree["data"].items()}
        found["evaluation.texts"] = tuple(tree["texts"])
    return found


def merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``layer`` on top, table by table."""
    merged = dict(base)
    if "source" in layer and layer["source"] != base.get("source"):
        for key in _BELONGS_TO_SOURCE:
            merged.pop(key, None)
    # A mixture stands in the place of a source: the layer that names one of them speaks last.
    if "source" in layer and not layer.get("mix"):
        merged.pop("mix", None)
    elif layer.get("mix"):
        for key in ("source", *OPTIONS):
            merged.pop(key, None)
    for key, value in layer.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def takes_list(kind: Any) -> bool:
    """Whether a field of type ``kind`` holds a list."""
    return any(typing.get_origin(option) is tuple for option in _options(kind))


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _read_value(name: str, kind: Any, text: str) -> Any:
    """``text`` as typed after ``--set name=``, as a value for a field of type ``kind``."""
    options, is_list = _options(kind), takes_list(kind)
    # Nothing at all is a list without members.
    if type(None) in options and text.strip().lower() in ("none", "null", *(() if is_list else ("",))):
        return None
    if str in options:
        return text
    if is_list:
        return members(text)
    try:
        # strict=False is msgspec's reading of text: "3" is an integer, "1e-4" a float, "true" a bool.
        return msgspec.convert(text.strip(), kind, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"cannot be {text!r}", where=name, hint=describe(kind)) from error
