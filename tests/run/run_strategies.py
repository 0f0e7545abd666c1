"""Hypothesis strategies for anything made of msgspec structs, derived from their field types."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal

import msgspec
from hypothesis import strategies as st

from engine.run import event_log, events

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def values(kind: Any, *, any_float: bool = False) -> st.SearchStrategy[Any]:
    """Values of type ``kind``; floats are finite unless ``any_float``."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)

    def inner(part: Any) -> st.SearchStrategy[Any]:
        return values(part, any_float=any_float)

    if isinstance(kind, types.UnionType) or origin is typing.Union:
        return st.one_of([inner(arg) for arg in args])
    if origin is Literal:
        return st.sampled_from(args)
    if origin is typing.Annotated:  # a name out of a table
        return st.sampled_from(args[1].names())
    if origin is tuple and args[0] is str:
        # Typed as one text, names are told apart by commas.
        names = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)
        return st.lists(names, max_size=4).map(tuple)
    if origin is tuple:
        return st.lists(inner(args[0]), max_size=4).map(tuple)
    if origin is list:
        return st.lists(inner(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(st.text(max_size=4), inner(args[1]), max_size=3)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return structs(kind, any_float=any_float)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**31), 2**62),
        float: st.floats() if any_float else st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text(max_size=8),
        type(None): st.none(),
        Any: JSON_VALUES,
    }
    return simple[kind]


def structs(kind: type[msgspec.Struct], *, any_float: bool = False) -> st.SearchStrategy[Any]:
    """Instances of a struct with every field drawn."""
    fields = msgspec.structs.fields(kind)
    return st.builds(kind, **{field.name: values(field.type, any_float=any_float) for field in fields})


def some_event(*, any_float: bool = False) -> st.SearchStrategy[events.Event]:
    """Any event of the closed set, with any payload."""
    return st.one_of([structs(kind, any_float=any_float) for kind in events.EVENT_TYPES])


def log_of(some: list[events.Event]) -> bytes:
    """The bytes of a log that holds ``some`` events."""
    return b"".join(event_log.encode(event) + b"\n" for event in some)
