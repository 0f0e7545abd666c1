"""Any file of a run, damaged or rewritten: its configuration, its manifest, its checkpoints, its export."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import operations
import places
from cases import Case, Target
from hostile import short, value
from mutate import mutate_file
from oracles import Rules
from world import VICTIMS, World

MOSTLY = ("checkpoints", "checkpoints", "checkpoints", "", "", "", "", "export", "logs", "control")
"""Folders of a run, as often as one of their files is chosen; "" is the run itself."""


def make(world: World, chance: Random) -> Case:
    folder = chance.choice(MOSTLY)
    _add_rare_files(world, chance)
    files = _files(world.run, folder) or _files(world.run, "")
    path = chance.choice(files)
    action = chance.random()
    other = chance.choice(files)
    if action < 0.06 and other != path:
        mutation = places.exchange(path, other, world)
    elif action < 0.12:
        mutation = places.misname(path, world, chance)
    else:
        mutation = mutate_file(path, world, chance)
    done = operations.looks(world, chance)
    trained = path.suffix != ".log" and (folder == "checkpoints" or chance.random() < 0.4)
    if trained:
        done += operations.works(world, chance)
    elif chance.random() < 0.1:
        done.append(operations.screens(world, chance))
    if chance.random() < 0.02:
        done += operations.programs(world, chance)
    if chance.random() < 0.5:
        done += operations.deletions(world, chance)
    return Case(f"{path.relative_to(world.run).parent}/{mutation}", done, _rules(path, folder))


def _rules(path: Path, folder: str) -> Rules:
    if path.name == "config.toml":
        return Rules(reads_outside=True, network=True)
    return Rules(export="all" if folder == "checkpoints" else "weights")


def _files(run: Path, folder: str) -> list[Path]:
    if not folder:
        return sorted(path for path in run.iterdir() if path.is_file())
    return places.regular_files(run / folder)


def _add_rare_files(world: World, chance: Random) -> None:
    """Files that only some runs have."""
    run = world.run
    identity = "00000000001767312000-0000abcd"
    rare = {
        run / "origin.json": {"path": str(world.runs), "id": "20260101-0000-x", "from_block": 0},
        run / "launch.json": {"pid": 1, "host": "here", "attempt": 1, "t": 1.0, "created": 1.0},
        run / "submitted.json": {"job": "12_3", "name": f"eqat-{run.name}", "cluster": "far", "t": 1.0},
        run / "control" / f"{identity}.json": {"id": identity, "request": "stop", "t": 1.0, "pid": 1},
        run / "logs" / "attempt-001.log": {"library": "says", "value": value(world, chance)},
    }
    path = chance.choice(list(rare))
    if path.name != "origin.json" or chance.random() < 0.3:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rare[path], default=short))


TARGET = Target("run", make, VICTIMS)
