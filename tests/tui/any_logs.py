"""Logs that hold anything their types allow: what a damaged disk, another version or an enemy could leave."""

from __future__ import annotations

import types
import typing
from typing import Any

import msgspec
from hypothesis import strategies as st

from engine.run import events
from engine.run.event_log import encode
from engine.run.events import Event

NASTY = (
    "",
    "\x1b]0;owned\x07",
    "\x1b]52;c;ZXZpbA==\x07\x9b31m",
    "exe.\u202egpj",
    "a\nb\r\nc\td\x7f",
    "[/]",
    "[bold red]x[/bold red]",
    "\\[",
    "x" * 100_000,
    "word " * 20_000,
    "中" * 3_000,
    "a" + "\u0301" * 5_000,
    "👩\u200d🔬" * 40,
    "\u2028\u2066\ufffe",
    "../../../../etc/passwd",
    "/proc/self/environ",
    "\0",
    "$(reboot)\"'`",
)
TEXT = st.sampled_from(NASTY) | st.text(max_size=30)
INTEGER = st.integers(-3, 40) | st.sampled_from((-(10**12), 10**12, 2**63, 10**30, 10**300, -1, 0))
NUMBER = (
    st.floats(0, 100)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from((0.0, -1.0, 1e15, -1e15, 1e300, -1e300, 1e-300, 5e-324))
)
JSON = st.recursive(
    st.none() | st.booleans() | INTEGER | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
PLAN: dict[str, Any] = {
    "model": "random://tiny-llama",
    "model_type": "llama",
    "parameters": 180800,
    "blocks": 4,
    "device": "cpu",
    "phases": [{"name": "block_ap", "peak_gpu_bytes": None, "peak_host_bytes": 5, "seconds": 12.0}],
    "peak_gpu_bytes": None,
    "peak_host_bytes": 518751744,
    "disk_bytes": 767949,
    "export_bytes": 160128,
    "fp_bytes": 361600,
    "bits_per_weight": 4.625,
    "activation_store": "host",
    "activation_store_reason": "fits",
    "recovery": {
        "interval_seconds": 240.0,
        "snapshots": {"block_ap": 0, "e2e_qp": 2},
        "lost_seconds": 0.07,
        "checkpoint_bytes": 643108,
        "checkpoint_seconds": 0.1,
        "share": 0.0027,
        "streams": "stored",
        "streams_every": 2,
        "streams_reason": "quick",
        "restart_seconds": 12.4,
    },
    "seconds": 13.5,
    "time_basis": "measured",
    "published": {
        "model": "Llama",
        "setting": "w2g64",
        "perplexity": 5.86,
        "accuracy": 60.1,
        "fp_perplexity": 5.47,
        "fp_accuracy": 64.9,
        "conditions": "paper",
    },
    "warnings": ["both use builtin"],
    "problems": [{"where": "x", "message": "does not fit", "hint": "smaller"}],
    "machine": {"gpu_name": None, "gpu_free": 0, "host_free": 9, "disk_free": 9, "cpus": 2},
}


@st.composite
def plans(draw: st.DrawFn) -> Any:
    """A plan in which some things are missing, of another type, or of a size that no machine has."""

    def damaged(value: Any) -> Any:
        if draw(st.integers(0, 6)) == 0:
            return draw(JSON)
        if isinstance(value, dict):
            return {name: damaged(one) for name, one in value.items() if draw(st.integers(0, 12))}
        return [damaged(one) for one in value] if isinstance(value, list) else value

    found = damaged(PLAN)
    return found if isinstance(found, dict) else {"plan": found}


def _of(kind: Any, name: str) -> st.SearchStrategy[Any]:
    """Values of a field's type, as JSON could hold them."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([st.none() if one is types.NoneType else _of(one, name) for one in arguments])
    if origin is dict:
        return plans() if name == "plan" else st.dictionaries(TEXT, _of(arguments[1], name), max_size=4)
    if origin is list:
        return st.lists(_of(arguments[0], name), max_size=3)
    if origin is tuple:
        return st.lists(_of(arguments[0], name), max_size=3).map(tuple)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{field: _of(hint, field) for field, hint in hints.items()})
    return {int: INTEGER, float: NUMBER, str: TEXT, bool: st.booleans()}[kind]


def _events(kind: type[Event]) -> st.SearchStrategy[Event]:
    hints = typing.get_type_hints(kind)
    fields = {field.name: _of(hints[field.name], field.name) for field in msgspec.structs.fields(kind)}
    # Most events of a log belong to one attempt.
    fields |= {"v": st.just(1), "attempt": st.just(1) | INTEGER}
    return st.builds(kind, **fields)


ANY_EVENT = st.one_of([_events(kind) for kind in events.EVENT_TYPES])
LOGS = st.lists(ANY_EVENT, min_size=1, max_size=25).map(tuple)


def as_written(log: typing.Iterable[Event]) -> bytes:
    """The log as the writer would have left it."""
    return b"".join(encode(event) + b"\n" for event in log)
