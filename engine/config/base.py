"""What a section of the configuration is made of: a frozen struct whose fields say what they mean.

Each section lives in a file of its own, one owner for every default, with its unit and effect.
"""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
LearningRateScaling = Literal["absolute", "relative"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every configuration struct: frozen, keyword-only, unknown fields rejected."""

    def check(self, name: str) -> None:
        """Refuse the first value that cannot work; ``name`` is that of the section, for messages.

        Rules that need the model or the machine (does the group size divide a layer, does it fit in memory)
        are the plan's; nothing here opens a file.

        Raises:
            UsageError: names the field.
        """

    @classmethod
    def decides(cls, field: str) -> bool:
        """Whether another value of a field computes something else; false for how a run is carried out."""
        return True

    @classmethod
    def younger(cls) -> tuple[str, ...]:
        """Fields that a hash leaves out where they have their default: it is that of versions without the
        field, since nothing else is computed."""
        return ()

    @classmethod
    def silent(cls) -> tuple[str, ...]:
        """Fields that are written nowhere where they have their default: neither into a run's configuration
        nor into the identity of its checkpoints, which versions without the field go on with."""
        return ()

    @classmethod
    def as_written_now(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """The section's table of a file with what earlier versions spelt otherwise as this one spells it."""
        return tree

    @classmethod
    def earlier(cls) -> Mapping[str, Any]:
        """What versions without a field did, by field, where that is not what its default does now: as that a
        run of theirs goes on."""
        return {}


@functools.cache
def field_types(section: type[Section]) -> Mapping[str, Any]:
    """Type of each field of a section, by name."""
    return {field.name: field.type for field in msgspec.structs.fields(section)}


def is_section(kind: Any) -> bool:
    """Whether a field of this type is a section of its own."""
    return isinstance(kind, type) and issubclass(kind, Section)


def mistake(error: msgspec.ValidationError) -> tuple[str, str]:
    """What is wrong with a value, and the dotted name of its field; msgspec says "Expected `int`, got `str` -
    at `$.block_ap.train[0]`"."""
    what, _, path = str(error).partition(" - at `$")
    return what.replace("`", "").replace("Invalid enum value", "cannot be"), path.strip(".`")


def takes(section: type[Section], where: str) -> str:
    """What the field at ``where`` below ``section`` takes, in words; empty where there is none."""
    kind: Any = section
    for part in re.sub(r"\[.*?\]", "", where).split("."):
        kind = field_types(kind).get(part) if is_section(kind) else None
    return describe(kind) if kind is not None else ""


def describe(kind: Any) -> str:
    """What a field of type ``kind`` takes, in words."""
    if isinstance(kind, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is Annotated:  # a name out of a table
        return "one of " + ", ".join(typing.get_args(kind)[1].names())
    if typing.get_origin(kind) is tuple:
        return "a list, each " + describe(typing.get_args(kind)[0])
    if is_section(kind):
        return "a table"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return words.get(kind, str(kind))
