"""Changing one place of a tree of dicts and lists, and writing what no encoder would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import hostile
import tomli_w
from hostile import Raw, short
from world import World

MARK = "\ue0f1raw{}\ue0f1"


def mutate_tree(tree: Any, world: World, chance: Random, *, toml: bool = False) -> str:
    """Change one place of a tree of dicts and lists, in place; what was done, in words."""
    places = list(_places(tree))
    if not places:
        raise LookupError("nothing to change")
    holder, key, words = chance.choice(places)
    action = chance.choice(("set", "set", "set", "set", "delete", "rename", "wrap", "swap", "add", "grow"))
    new = hostile.value(world, chance, toml=toml)
    if action == "delete":
        del holder[key]
    elif action == "rename" and isinstance(holder, dict):
        holder[chance.choice(hostile.texts(world))] = holder.pop(key)
    elif action == "wrap":
        holder[key] = chance.choice(([holder[key]], {"value": holder[key]}))
    elif action == "swap":
        other, there, _ = chance.choice(places)
        holder[key], other[there] = other[there], holder[key]
    elif action == "add" and isinstance(holder, dict):
        holder[chance.choice(hostile.texts(world))] = new
    elif action == "grow" and isinstance(holder[key], list):
        holder[key] = holder[key] * 10_000 or [new]
    else:
        action, holder[key] = "set", new
    return f"{action} {words} {short(new) if action in ('set', 'add') else ''}".rstrip()


def _places(tree: Any, words: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every place below ``tree``: what holds it, its key, its path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items)[:200]:
        path = f"{words}.{key}" if words else str(key)
        yield tree, key, path[:80]
        yield from _places(value, path)


def marked(tree: Any, raws: list[str]) -> Any:
    """``tree`` with its raw pieces replaced by marks, which :func:`unmarked` replaces in the text."""
    if isinstance(tree, Raw):
        raws.append(str(tree))
        return MARK.format(len(raws) - 1)
    if isinstance(tree, dict):
        return {str(key): marked(value, raws) for key, value in tree.items()}
    return [marked(value, raws) for value in tree] if isinstance(tree, list) else tree


def unmarked(text: str, raws: list[str]) -> str:
    for index, raw in enumerate(raws):
        for mark in (MARK.format(index), json.dumps(MARK.format(index))[1:-1]):
            text = text.replace(f'"{mark}"', raw)
    return text


def to_json(tree: Any) -> str:
    raws: list[str] = []
    return unmarked(json.dumps(marked(tree, raws), ensure_ascii=False), raws)


def to_toml(tree: Any) -> str:
    raws: list[str] = []
    return unmarked(tomli_w.dumps(marked(tree, raws)), raws)
