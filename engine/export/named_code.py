"""Keys of a model's JSON files that name code, which a loader would fetch and run.

``auto_map`` and ``custom_pipelines`` name classes in Python files, of the folder itself (``module.Class``) or
of any repository (``other/repo--module.Class``); an attention implementation may be the name of a repository
of kernels. An export carries such a name only where the code was allowed to run and lies beside it: a name
without its code is a broken promise at best, and at worst somebody else's code in whoever loads the export.
"""

from __future__ import annotations

import json
from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import Any

from engine.export.shards import write_json
from engine.system.guarded import LARGE, BadFile, parsed, read_bytes

CLASSES, PIPELINES = "auto_map", "custom_pipelines"
KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")

DATA_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json", "encoder.json", "tekken.json")
"""Their keys are tokens: one that is called ``auto_map`` is a word, not a name of code."""


def modules_in(folder: Path) -> set[str]:
    """Names of the Python modules that lie in ``folder`` itself."""
    return {path.stem for path in folder.glob("*.py") if path.is_file() and not path.is_symlink()}


def drop_missing_code(folder: Path, modules: Set[str]) -> list[str]:
    """Rewrite the JSON files of ``folder`` that name code outside of ``modules``; what was dropped.

    Files that name none are left as they are, byte for byte.
    """
    dropped: list[str] = []
    for path in sorted(folder.glob("*.json")):
        if path.name in DATA_FILES:
            continue
        found: list[str] = []
        content = read_bytes(path, LARGE)
        try:
            config = parsed(json.loads, content, path)
        except BadFile:
            continue  # what cannot be parsed here names nothing to a loader either
        kept = parsed(partial(without_missing, modules=modules, dropped=found), config, path)
        if kept != config:
            write_json(path, kept)
        dropped += found
    return dropped


def without_missing(value: Any, modules: Set[str], dropped: list[str]) -> Any:
    """``value``, from JSON, without names of code outside of ``modules``; those are added to ``dropped``."""
    if isinstance(value, list):
        return [without_missing(item, modules, dropped) for item in value]
    if not isinstance(value, dict):
        return value
    kept: dict[str, Any] = {}
    for key, inner in value.items():
        if key in (CLASSES, PIPELINES):
            there = (_classes if key == CLASSES else _pipelines)(inner, modules, dropped)
            if there:
                kept[key] = there
        elif key in KERNELS and isinstance(inner, str) and "/" in inner:
            dropped.append(inner)
        else:
            kept[key] = without_missing(inner, modules, dropped)
    return kept


def _classes(named: Any, modules: Set[str], dropped: list[str]) -> Any:
    """The part of ``named`` (a name, the list of a slow and a fast tokenizer, or one of these by class) whose
    code is there; none where nothing is left."""
    if isinstance(named, dict):
        kept = {key: _classes(inner, modules, dropped) for key, inner in named.items()}
        return {key: inner for key, inner in kept.items() if inner} or None
    if isinstance(named, list):
        each = [_classes(inner, modules, dropped) for inner in named]
        return each if any(each) else None
    if not isinstance(named, str):
        return None
    module, _, name = named.partition(".")
    if module in modules and name.isidentifier():
        return named
    dropped.append(named)
    return None


def _pipelines(named: Any, modules: Set[str], dropped: list[str]) -> Any:
    """The pipelines whose ``impl`` is there."""
    if not isinstance(named, dict):
        return None
    return {
        task: inner
        for task, inner in named.items()
        if isinstance(inner, dict) and _classes(inner.get("impl"), modules, dropped)
    }
