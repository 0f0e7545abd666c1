"""A GGUF file whose header lies: counts, lengths, types, alignments, names."""

from __future__ import annotations

from random import Random

import operations
from cases import Case, Target
from mutate import mutate_file
from target_model import trained
from world import World


def make(world: World, chance: Random) -> Case:
    mutation = mutate_file(world.gguf, world, chance)
    done = [
        operations.command(world, "plan", "smoke", "--model", str(world.gguf), "--device", "cpu", tells=True),
        operations.read(world, operations.plan_model, world.gguf),
        operations.read(world, operations.open_model, world.gguf),
    ]
    if chance.random() < 0.2:
        done.append(trained(world, {"model.source": str(world.gguf)}))
    return Case(mutation, done)


TARGET = Target("gguf", make, ("finished",))
