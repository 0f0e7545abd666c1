"""Calibration text in every format that is read, damaged or made to hurt its reader."""

from __future__ import annotations

import gzip
from pathlib import Path
from random import Random

import operations
import places
from cases import Case, Target
from mutate import mutate_bytes, mutate_file
from target_model import trained
from world import World


def make(world: World, chance: Random) -> Case:
    path = chance.choice(places.regular_files(world.texts))
    if chance.random() < 0.1:
        mutation = places.misname(path, world, chance)
    elif path.suffix == ".gz" and chance.random() < 0.6:
        mutation = _inside(path, world, chance)
    else:
        mutation = mutate_file(path, world, chance)
    source = path if path.parent == world.texts and path.exists() else world.texts / "folder"
    done = [
        operations.command(world, "plan", "smoke", "--data", str(source), "--device", "cpu", tells=True),
        operations.read(world, operations.read_texts, source),
    ]
    if chance.random() < 0.2:
        done.append(trained(world, {"data.source": str(source), "evaluation.data.source": str(source)}))
    return Case(mutation, done)


def _inside(path: Path, world: World, chance: Random) -> str:
    """What is compressed is damaged, and compressed again."""
    plain = path.with_suffix("")
    kept = plain.read_bytes() if plain.exists() else None
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    mutation = mutate_file(plain, world, chance) if chance.random() < 0.8 else mutate_bytes(plain, chance)
    path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    if kept is not None:
        plain.write_bytes(kept)
    return f"inside {path.name}: {mutation}"


TARGET = Target("text", make, ("finished",))
