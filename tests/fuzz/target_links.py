"""Links, FIFOs, sockets and folders where a file or a folder of a run, a model or a text should be."""

from __future__ import annotations

from random import Random

import operations
import places
from cases import Case, Target
from oracles import Rules
from world import NEIGHBOUR, VICTIMS, World

MISSING = (
    "export/gptq_v2.partial",
    "export/gptq_v2.old",
    "export/gptq_v2.failed",
    "cache/full.bin",
    "cache/streams-001-full.raw",
    "checkpoints/.CURRENT.1.0000abcd.tmp",
    f"checkpoints/objects/.{'a' * 64}.safetensors.1.0000abcd.tmp",
    "checkpoints/generation-000999.json",
    ".status.json.1.0000abcd.tmp",
    "control/..json",
    "logs/attempt-002.log",
    "launch.json",
    "submitted.json",
    "origin.json",
    "status.json",
)
"""Names that a run takes for its own as soon as they are there."""


def make(world: World, chance: Random) -> Case:
    kind = chance.random()
    if kind < 0.15:
        return _in_a_model(world, chance)
    if kind < 0.25:
        return _in_a_text(world, chance)
    if kind < 0.4:
        return _beside_the_run(world, chance)
    names = [str(path.relative_to(world.run)) for path in places.entries(world.run)]
    # Folders lead to much, and files of checkpoints are many: each kind gets its share.
    folders = [name for name in names if (world.run / name).is_dir()]
    top = [name for name in names if "/" not in name]
    path = world.run / chance.choice(chance.choice((folders, folders, top, names, MISSING)))
    return _case(world, chance, places.displace(path, world, chance))


def _beside_the_run(world: World, chance: Random) -> Case:
    """The run itself, the folder of runs, or a deletion that was cut off, is a link."""
    path = chance.choice(
        (
            world.run,
            world.runs / "20260103-0000-linked-w3g32-aaaa",
            world.runs / ".removed-20260102-0000-x-w3g32-0000abcd",
            world.runs / "latest",
        )
    )
    kind = chance.choice((*places.FOR_FOLDERS, "a link to a run"))
    if kind == "a link to a run":
        places.put("nothing", path, world, chance)
        path.symlink_to(world.runs / NEIGHBOUR)
        mutation = f"{path.name} is {kind}"
    else:
        mutation = places.put(kind, path, world, chance)
    done = [*operations.looks(world, chance), *operations.deletions(world, chance)]
    return Case(mutation, done, Rules(reads_outside=True))  # a run may lie on another disk


def _in_a_model(world: World, chance: Random) -> Case:
    choices = [world.model, world.gguf, *places.entries(world.model)]
    mutation = places.displace(path := chance.choice(choices), world, chance)
    source = world.gguf if path == world.gguf else world.model
    return Case(
        mutation,
        [
            operations.command(world, "plan", "smoke", "--model", str(source), "--device", "cpu"),
            operations.read(world, operations.plan_model, source),
            operations.read(world, operations.open_model, source),
        ],
        Rules(reads_outside=True),
    )


def _in_a_text(world: World, chance: Random) -> Case:
    choices = [path for path in places.entries(world.texts / "folder") if not path.is_dir()]
    mutation = places.displace(chance.choice(choices), world, chance)
    source = world.texts / "folder"
    done = [
        operations.command(world, "plan", "smoke", "--data", str(source), "--device", "cpu"),
        operations.read(world, operations.read_texts, source),
    ]
    return Case(mutation, done, Rules(reads_outside=True))


def _case(world: World, chance: Random, mutation: str) -> Case:
    done = operations.looks(world, chance)
    if chance.random() < 0.5:
        done += operations.works(world, chance)
    if chance.random() < 0.02:
        done += operations.programs(world, chance)
    done += operations.deletions(world, chance)
    return Case(mutation, done, Rules(export="weights"))


TARGET = Target("links", make, VICTIMS)
