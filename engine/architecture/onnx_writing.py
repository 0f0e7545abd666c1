"""What an ONNX graph can hold of a model, as far as its configuration says.

A graph takes the same way whatever the text is. Whether one can be made of a network shows when it is traced
(:mod:`engine.export.onnx_graph`), before anything is trained; what is known to look at the text first is
refused here, where a plan can say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.architecture.families import Architecture, text_config
from engine.config.grid import GridConfig


def refusal(arch: Architecture, config: Mapping[str, Any], grid: GridConfig) -> str:
    """What of a model a graph cannot hold, in words; empty where nothing is known."""
    text = text_config(config)
    for said in (text.get("rope_parameters"), text.get("rope_scaling")):
        # Of all layers, or of each kind of them.
        parts = (said, *said.values()) if isinstance(said, Mapping) else ()
        if any(_kind(part) == "dynamic" for part in parts):
            return "rotary scaling of type 'dynamic', which is computed anew for the length of each text"
    return ""


def _kind(rope: object) -> object:
    return (rope.get("rope_type") or rope.get("type")) if isinstance(rope, Mapping) else None
