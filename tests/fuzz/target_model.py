"""A model's folder as somebody might publish it: damaged, lying about itself, or with code in it."""

from __future__ import annotations

import json
from random import Random

import operations
import places
from cases import Case, Target
from engine_runs import SMALL
from hostile import short
from hostile import value as hostile_value
from mutate import mutate_file
from world import World

from engine.config.loading import load
from engine.run.directory import RunDirectory

CODE = """import os
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
open({canary!r}, "w").close()
class Config(LlamaConfig): model_type = "evil"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""
CLASSES = {
    "AutoConfig": "modeling_evil.Config",
    "AutoModelForCausalLM": "modeling_evil.Model",
    "AutoTokenizer": ["modeling_evil.Tokenizer", "modeling_evil.Tokenizer"],
}


def make(world: World, chance: Random) -> Case:
    if chance.random() < 0.2:
        mutation = _with_code(world, chance)
    elif chance.random() < 0.1:
        mutation = places.misname(chance.choice(places.regular_files(world.model)), world, chance)
    else:
        mutation = _damaged(world, chance)
    source = world.model
    done = [
        operations.command(world, "plan", "smoke", "--model", str(source), "--device", "cpu", tells=True),
        operations.read(world, operations.plan_model, source),
        operations.read(world, operations.open_model, source),
    ]
    if chance.random() < 0.3:
        done.append(trained(world, {"model.source": str(source)}))
    return Case(mutation, done)


def _damaged(world: World, chance: Random) -> str:
    """One to three changes of its files; sometimes its weights are said to lie in shards."""
    if chance.random() < 0.3:
        _with_index(world)
    files = places.regular_files(world.model)
    return "; ".join(
        mutate_file(chance.choice(files), world, chance) for _ in range(chance.choice((1, 1, 1, 2, 3)))
    )


def _with_index(world: World) -> None:
    from engine.architecture.headers import safetensors_header
    from engine.system.stamps import StampedFile

    names = safetensors_header(StampedFile.of(world.model / "model.safetensors"))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (world.model / "model.safetensors.index.json").write_text(json.dumps(index))


def _with_code(world: World, chance: Random) -> str:
    """The folder brings code, and asks in one of the usual ways that it is run."""
    (world.model / "modeling_evil.py").write_text(CODE.format(canary=str(world.canary)))
    name = chance.choice(("config.json", "tokenizer_config.json", "generation_config.json"))
    path = world.model / name
    tree = json.loads(path.read_text())
    tree["auto_map"] = dict(CLASSES)
    asked = chance.choice(("auto_map", "another type", "a repository", "custom_generate", "template"))
    if asked == "another type":
        tree["model_type"] = tree["tokenizer_class"] = "evil"
    elif asked == "a repository":
        tree["auto_map"] = dict.fromkeys(CLASSES, f"evil/model--{CLASSES['AutoConfig']}")
    elif asked == "custom_generate":
        (world.model / "custom_generate").mkdir()
        (world.model / "custom_generate" / "generate.py").write_text(CODE.format(canary=str(world.canary)))
        tree["custom_generate"] = "custom_generate"
    elif asked == "template":
        tree["chat_template"] = (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os }}"
        )
    else:
        tree["auto_map"][chance.choice(list(CLASSES))] = new = hostile_value(world, chance)
        asked = f"{asked} {short(new)}"
    path.write_text(json.dumps(tree, default=str))
    return f"{name} has code: {asked}"


def trained(world: World, settings: dict[str, object]) -> operations.Operation:
    """A new run from its beginning to its end."""
    run = RunDirectory.create(world.work, load("smoke", overrides={**SMALL, **settings}))
    return operations.engine(world, run=run.path)


TARGET = Target("model", make, ("finished",))
