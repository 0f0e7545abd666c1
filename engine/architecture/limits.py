"""How large the numbers of a config.json may be before anybody uses them.

A configuration is read twice, by the plan and by transformers, and both do what it says: build as many
blocks, labels, experts and positions as it names. One line of text could thus ask for a day of work or for
more memory than there is. So a configuration is looked through once, here, before either of them sees it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.system.guarded import BadFile

MOST_BLOCKS = 4096
MOST_HEADS = 1 << 16
MOST_EXPERTS = 1 << 16
MOST_LABELS = 1_000_000
WIDEST = 1 << 20
"""Hidden states and what is as wide as they are."""
LARGEST_SIZE = 1 << 24
"""Vocabularies and feed-forward layers."""
MOST_POSITIONS = 1 << 31
DEEPEST = 64
"""Levels of lists and tables; a real configuration has four."""
MOST_VALUES = 2_000_000
LARGEST_NUMBER = 1 << 63
LONGEST_NAME = 200
"""Characters of the name of a type or a class."""

_BOUNDS: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), most)
    for pattern, most in (
        (r"num_labels", MOST_LABELS),
        (r"(num_|n_).*layers?|n_layer|\w+_layers|num_.*blocks", MOST_BLOCKS),
        (r"(num_|n_)?\w*heads?|n_head|num_key_value_groups", MOST_HEADS),
        (r"\w*experts|num_experts_per_\w+", MOST_EXPERTS),
        (r"hidden_size\w*|n_embd|d_model|dim|head_dim|\w+_head_dim|\w+_rank|word_embed_proj_dim", WIDEST),
        (
            r"vocab_size\w*|intermediate_size|\w+_intermediate_size|n_inner|ffn_dim|ffn_hidden_size",
            LARGEST_SIZE,
        ),
        (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length", MOST_POSITIONS),
    )
)
"""By a field's whole name, the first that fits."""


def check_config(config: Mapping[str, Any], where: Path | str) -> None:
    """Refuse a configuration whose numbers, nesting or types no model can have.

    Fields are read as transformers reads them afterwards; this only keeps away what would make either of us
    work or reserve without bounds, or stumble over a type.

    Raises:
        BadFile: with the name of the field.
    """
    labels = config.get("id2label")
    if isinstance(labels, Mapping) and len(labels) > MOST_LABELS:
        raise _refused("id2label", f"has more than {MOST_LABELS} entries", where)
    for count, (field, value, depth) in enumerate(_values(config)):
        if count > MOST_VALUES or depth > DEEPEST:
            raise BadFile(
                "is nested too deeply for a configuration"
                if depth > DEEPEST
                else f"has more than {MOST_VALUES} values, too many for a configuration",
                where=str(where),
            )
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(field, value, where)
        elif field in _TYPES and value is not None and not _TYPES[field][0](value):
            raise _refused(field, f"has to be {_TYPES[field][1]}", where)
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(map(_is_name, names))):
        raise _refused("architectures", "has to be a list of names", where)


def _is_name(value: Any) -> bool:
    """Messages repeat it."""
    return isinstance(value, str) and len(value) <= LONGEST_NAME and value.isprintable()


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (_is_name, "a name"),
    "auto_map": (_is_table, "a table"),
    "text_config": (_is_table, "a table"),
}


def _check_number(field: str, value: int | float, where: Path | str) -> None:
    if field in _TYPES:
        raise _refused(field, f"has to be {_TYPES[field][1]}", where)
    if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
        raise _refused(field, "is a number of more than 64 bits", where)
    most = _bound(field)
    if most is not None and (not math.isfinite(value) or value > most):
        raise _refused(field, f"is {value:g}, and no model has more than {most}", where)


@functools.lru_cache(4096)
def _bound(field: str) -> int | None:
    return next((most for pattern, most in _BOUNDS if pattern.fullmatch(field)), None)


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Every value in it with its field, which entries of a list share with the list, and its depth.

    Without recursion: nesting is what is looked for.
    """
    waiting: list[tuple[str, Any, int]] = [("", config, 0)]
    while waiting:
        field, value, depth = waiting.pop()
        yield field, value, depth
        if depth > DEEPEST:
            continue
        if isinstance(value, Mapping):
            waiting.extend((str(key), inner, depth + 1) for key, inner in value.items())
        elif isinstance(value, list | tuple):
            waiting.extend((field, inner, depth + 1) for inner in value)


def _refused(field: str, why: str, where: Path | str) -> BadFile:
    return BadFile(f"{field[:80]} {why}", where=str(where), hint="check that the file belongs to a model")
