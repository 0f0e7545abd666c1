"""A network's graph, traced once: no weight is in it, so that it is the same whatever the grid is, and a
trace takes seconds."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from engine.export import onnx_file
from engine.models.causal_lm import CausalLM


@contextmanager
def traced_once() -> Iterator[None]:
    """Inside, every export of a network gets a copy of the graph of its first one."""
    graphs: dict[tuple[object, ...], Any] = {}
    traced = onnx_file.traced

    def once(lm: CausalLM, buffers: Iterable[str]) -> Any:
        network = {name: said for name, said in lm.source.config.to_dict().items() if name != "_name_or_path"}
        named = tuple(buffers)
        asked = (json.dumps(network, sort_keys=True), lm.tied, named)
        if asked not in graphs:
            graphs[asked] = traced(lm, named)
        return copy.deepcopy(graphs[asked])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "traced", once)
        yield
