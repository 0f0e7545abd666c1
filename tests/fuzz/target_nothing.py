"""Victims as they were made: everything that is done with the others must succeed with these.

A fuzzer whose victims are all refused at the door finds nothing behind it.
"""

from __future__ import annotations

from random import Random

import operations
from cases import Case, Target
from oracles import Rules
from target_model import trained
from world import VICTIMS, World


def make(world: World, chance: Random) -> Case:
    text = world.texts / "folder"
    configs = sorted(world.configs.glob("*.toml"))
    done = [
        operations.command(world, "plan", str(world.configs / "local.toml"), tells=True),
        *(operations.read(world, operations.load_config, path) for path in configs),
        *(operations.read(world, operations.read_texts, path) for path in sorted(world.texts.iterdir())),
        *(operations.read(world, operations.open_model, path) for path in (world.model, world.gguf)),
        trained(world, {"model.source": str(world.gguf), "data.source": str(text)}),
        trained(world, {"model.source": str(world.model), "data.source": str(text)}),
        operations.screens(world, chance),
        operations.engine(world),
        *operations.works(world, chance),
        *operations.looks(world, chance),
        *(operations.programs(world, chance) if chance.random() < 0.5 else ()),
        *operations.deletions(world, chance),
    ]
    return Case("nothing", done, Rules(export="all"))


TARGET = Target("nothing", make, VICTIMS)
