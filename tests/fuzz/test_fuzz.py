"""A short run of the fuzzer, and proof that it sees what it looks for; ``make fuzz`` is the long one."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import oracles
import pytest
from fuzz import TARGETS, every, fuzz, told
from mutate import STRUCTURED, mutate_file
from operations import Operation
from oracles import Rules, Surroundings, of_ending
from sandbox import Ended, run_limited
from world import NEIGHBOUR, TOKEN, World, furnish

CASES = 1
"""Of each target."""


def test_mutated_files_are_refused_or_passed_over_and_never_do_harm() -> None:
    cases = [("nothing", 0, 0), *itertools.islice(every(TARGETS, 0), CASES * len(TARGETS))]
    findings = fuzz(cases, workers=2, speak=False)
    assert [told(answer) for answer in findings.faulty] == []
    done = {answer["target"]: answer for answer in findings.answers}
    assert done.keys() == {*TARGETS, "nothing"}
    # What is not mutated works, or all that was refused would prove nothing.
    refused = [name for name, code in done["nothing"]["codes"] if code]
    assert [name for name in refused if not name.startswith(("eqat rm runs", "eqat stop"))] == []


# -- the oracles ---------------------------------------------------------------------------------------

STRICT = Rules()


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path / "world")
    furnish(made)
    (made.runs / NEIGHBOUR).mkdir()
    made.run.mkdir()
    return made


def faults_of(
    world: World, action: Callable[[World], object], rules: Rules = STRICT, cpu: int = 20, wall: float = 30.0
) -> set[str]:
    """Kinds of faults that are found in what ``action`` does."""

    def act() -> None:
        action(world)

    operation, around = Operation("it", act), Surroundings(world, rules)
    ended = run_limited(act, world.root.parent / "scratch", world.environment(), world.work, cpu, wall)
    found = [*of_ending(operation, ended, rules, 1 << 30), *around.faults(operation)]
    around.close()
    return {fault.kind for fault in found}


def connect(world: World) -> None:
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    except OSError:
        pass


HARM: dict[str, tuple[str, Callable[[World], object]]] = {
    "the secret is printed": ("leaked", lambda world: print(f"not a number: {TOKEN}")),
    "the secret is copied": ("leaked", lambda world: shutil.copy(world.secret / "key", world.run)),
    "a hidden command runs": ("executed", lambda world: world.canary.touch()),
    "a program is started": ("executed", lambda world: os.system("true")),
    "a pickle names a function": ("executed", lambda world: pickle.loads(pickle.dumps(time.sleep))),
    "the network is used": ("network", connect),
    "a start-up file is written": (
        "changed outside",
        lambda world: (world.home / ".bashrc").write_text("x") and 0,
    ),
    "only a time is changed": ("changed outside", lambda world: os.utime(world.home / ".profile", (1, 1))),
    "a file appears beside": ("changed outside", lambda world: (world.root / "new").touch()),
    "the neighbour loses a folder": ("changed outside", lambda world: (world.runs / NEIGHBOUR).rmdir()),
    "another's file is opened": (
        "read outside",
        lambda world: (world.elsewhere / "data.txt").read_text() and 0,
    ),
    "an escape sequence is printed": ("control character", lambda world: print("\x1b[31mred")),
    "a C1 control is printed": ("control character", lambda world: print("\x9b31mred")),
    "text is turned around": ("control character", lambda world: print("\u202egnp.txt")),
    "bytes that are no text are printed": ("control character", lambda world: os.write(1, b"\xff\n")),
    "an exception gets through": ("a bug (1)", lambda world: [][0]),
    "a traceback is shown": ("traceback", lambda world: print("Traceback (most recent call last):")),
    "the log has a traceback": ("traceback", lambda world: traced(world)),
    "an exit code means nothing": ("undocumented exit", lambda world: sys.exit(9)),
}


def traced(world: World) -> None:
    (world.run / "logs").mkdir()
    (world.run / "logs" / "attempt-001.log").write_text("Traceback (most recent call last):\n")


@pytest.mark.parametrize("harm", HARM)
def test_the_fuzzer_sees_when(harm: str, world: World) -> None:
    kind, action = HARM[harm]
    assert kind in faults_of(world, action)


def test_the_fuzzer_finds_nothing_where_nothing_is_done(world: World) -> None:
    assert faults_of(world, lambda world: print("naïve – 12.5 %\tok")) == set()
    assert faults_of(world, lambda world: sys.exit(3)) == set()
    _, opens = HARM["another's file is opened"]
    assert faults_of(world, opens, Rules(reads_outside=True)) == set()


def test_the_fuzzer_ends_what_hangs_and_what_computes_for_ever(world: World) -> None:
    def spin(world: World) -> None:
        while True:
            pass

    assert faults_of(world, lambda world: time.sleep(60), wall=0.3) == {"hang"}
    assert faults_of(world, spin, cpu=1) == {"hang"}


def test_the_fuzzer_sees_how_much_memory_was_held() -> None:
    ended = Ended(0, b"", b"", 0.1, late=False, peak=oracles.MOST_MEMORY + 2, noticed=())
    assert [fault.kind for fault in of_ending(Operation("it", int), ended, Rules(), 1)] == ["memory"]
    assert of_ending(Operation("it", int), ended, Rules(), 2) == []


# -- the mutations -------------------------------------------------------------------------------------

SEEDS = 10
CONTENT = {
    ".json": b'{"a": [1, {"b": "text"}], "c": null}',
    ".jsonl": b'{"kind": "metric", "t": 1.5}\n{"kind": "error", "hint": "x"}\n',
    ".toml": b'name = "x"\n[grid]\nbits = 3\n',
    ".safetensors": (72).to_bytes(8, "little")
    + b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'.ljust(72)
    + b"ab",
    ".txt": b"some words\n",
}


def test_the_same_seed_makes_the_same_mutation_and_another_seed_another(world: World, tmp_path: Path) -> None:
    for suffix, content in CONTENT.items():
        path = tmp_path / f"file{suffix}"
        made: list[tuple[str, bytes]] = []
        for seed in (*range(SEEDS), *range(SEEDS)):
            path.write_bytes(content)
            words = mutate_file(path, world, Random(seed))
            made.append((words, path.read_bytes()))
        assert made[:SEEDS] == made[SEEDS:], suffix
        assert len({data for _, data in made}) > SEEDS / 2, suffix
        assert sum(data != content for _, data in made[:SEEDS]) > SEEDS / 2, suffix
    assert STRUCTURED.keys() - CONTENT.keys() == {".gguf"}  # which the case without a mutation needs whole
