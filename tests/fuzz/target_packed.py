"""A quantized checkpoint of somebody's, damaged or lying about itself."""

from __future__ import annotations

from random import Random

import operations
import places
from cases import Case, Target
from mutate import mutate_file
from world import World


def make(world: World, chance: Random) -> Case:
    folder = world.run / "export" / "gptq_v2"
    files = places.regular_files(folder)
    mutation = "; ".join(
        mutate_file(chance.choice(files), world, chance) for _ in range(chance.choice((1, 1, 1, 2, 3)))
    )
    done = [
        operations.read(world, operations.import_checkpoint, folder),
        operations.read(world, operations.judge_checkpoint, folder),
    ]
    return Case(mutation, done)


TARGET = Target("packed", make, ("finished",))
