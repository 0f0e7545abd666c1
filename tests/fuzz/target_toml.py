"""A configuration that somebody else wrote."""

from __future__ import annotations

from random import Random

import operations
import places
from cases import Case, Target
from hostile import texts
from mutate import mutate_file
from oracles import Rules
from world import World


def make(world: World, chance: Random) -> Case:
    path = chance.choice(sorted(world.configs.glob("*.toml")))
    kind = chance.random()
    if kind < 0.1:
        mutation = places.displace(path, world, chance)
    elif kind < 0.2:
        base = chance.choice([*texts(world), str(path), "child.toml", str(world.secret / "key.toml")])
        path.write_text("extends = " + _quoted(base) + "\n")
        mutation = f"{path.name} extends {base[:60]!a}"
    else:
        mutation = "; ".join(mutate_file(path, world, chance) for _ in range(chance.choice((1, 1, 2))))
    asked = world.configs / "child.toml" if path.name == "base.toml" else path
    done = [
        operations.command(world, "plan", str(asked), "--runs-dir", str(world.runs), tells=True),
        operations.command(world, "run", str(asked), "--dry-run", "--json", "--runs-dir", str(world.runs)),
        operations.read(world, operations.load_config, asked),
    ]
    return Case(mutation, done, Rules(reads_outside=True, network=True))


def _quoted(text: str) -> str:
    return (
        '"'
        + "".join(f"\\u{ord(letter):04x}" if not letter.isalnum() else letter for letter in text[:5000])
        + '"'
    )


TARGET = Target("toml", make, ("finished",))
