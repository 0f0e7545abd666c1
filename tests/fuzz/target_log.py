"""A run's log as an older, a newer, a broken or a malicious program would have written it."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import hostile
import operations
from cases import Case, Target
from hostile import short
from mutate import mutate_file
from oracles import Rules
from trees import to_json
from world import VICTIMS, World

LINES = 20_000
"""As many as a run of a day writes."""


def make(world: World, chance: Random) -> Case:
    path = world.run / "events.jsonl"
    kind = chance.random()
    if kind < 0.4:
        mutation = "; ".join(mutate_file(path, world, chance) for _ in range(chance.choice((1, 2, 5))))
    else:
        lines = path.read_text().splitlines()
        mutation, lines = _rewritten(lines, world, chance)
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n")
    done = operations.looks(world, chance)
    if chance.random() < 0.3:
        done.append(operations.screens(world, chance))
    if chance.random() < 0.3:
        done.append(operations.command(world, "attach", "--plain", str(world.run)))
    if chance.random() < 0.2:
        done += operations.works(world, chance)
    return Case(mutation, done, Rules(export="weights"))


def _rewritten(lines: list[str], world: World, chance: Random) -> tuple[str, list[str]]:
    """One field of many events is set to something hostile, or lines come that no engine writes."""
    trees: list[dict[str, Any]] = [json.loads(line) for line in lines]
    kind = chance.choice(("field", "field", "clock", "clock", "unknown", "order", "many", "texts"))
    new = hostile.value(world, chance)
    if kind == "field":
        name = chance.choice(sorted({key for tree in trees for key in tree}))
        _set(trees, name, new)
        return f"{name} is {short(new)} in every event", list(map(to_json, trees))
    if kind == "clock":
        name = chance.choice(("t", "mono", "seq", "attempt", "v", "seconds"))
        _set(trees, name, new := chance.choice([1e15, -1e15, 1e308, -1, 0, 2**70, 1e-9, "now", None]))
        return f"{name} is {new} in every event", list(map(to_json, trees))
    if kind == "texts":
        _set_texts(trees, new := chance.choice(hostile.texts(world)))
        return f"every text is {short(new)}", list(map(to_json, trees))
    if kind == "order":
        chance.shuffle(lines)
        return "the lines are in another order", lines
    line = chance.choice(lines)
    if kind == "many":
        return f"{LINES} times {line[:80]}", [*lines, *[line] * LINES]
    lines.insert(chance.randrange(len(lines)), to_json({**json.loads(line), "kind": new}))
    return f"an event of kind {short(new)}", lines


def _set(trees: list[dict[str, Any]], name: str, value: Any) -> None:
    for tree in trees:
        if name in tree:
            tree[name] = value


def _set_texts(tree: Any, text: str) -> None:
    """Every text but the kinds of events, which decide how the rest is read."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        if isinstance(value, str) and key not in ("kind", "phase", "stage", "outcome", "format"):
            tree[key] = text
        elif isinstance(value, dict | list):
            _set_texts(value, text)


TARGET = Target("log", make, VICTIMS)
