"""What an ONNX graph can hold of a model, as far as its configuration says.

A graph takes the same way whatever the text is. Whether one can be made of a network shows when it is traced
(:mod:`engine.export.onnx_graph`), before anything is trained; what is known to ask the text first is refused
here, where a plan can say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.architecture.families import Architecture, text_config
from engine.config.grid import GridConfig

BY_LENGTH = ("dynamic", "longrope")
"""Rotary scaling that transformers chooses by the length of each text."""


def refusal(arch: Architecture, config: Mapping[str, Any], grid: GridConfig) -> str:
    """What of a model a graph cannot hold, in words; empty where nothing is known."""
    kinds = _rotary_kinds(text_config(config))
    return next((f"rotary scaling of type {kind!r}, chosen by the length of a text" for kind in kinds), "")


def _rotary_kinds(text: Mapping[str, Any]) -> Iterator[str]:
    """The types of rotary scaling, of all layers or of each kind, that depend on a text's length."""
    for said in (text.get("rope_parameters"), text.get("rope_scaling")):
        if isinstance(said, Mapping):
            for part in (said, *said.values()):
                kind = (part.get("rope_type") or part.get("type")) if isinstance(part, Mapping) else None
                if kind in BY_LENGTH:
                    yield str(kind)
