"""Flip single bits of real checkpoints and look at what is made of them.

    python tests/engine/bitflips.py --flips 5000 --seed 0

Four small runs are brought to where a run may stand when its disk errs: stopped inside Block-AP, stopped
inside E2E-QP, done, and done and cleaned by ``eqat gc``. Then one bit of one file below ``checkpoints/`` is
flipped, the checkpoint is opened as an engine would, and the bit is put back; again and again. Whatever is
accepted has to be what was committed: all of it, or, with a warning, a part of it. Nothing may be accepted
with other content, and no run may be lost.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine_runs import make_run, of, output, snapshots_at_any_cost, start

from engine.errors import EqatError
from engine.run import events, generations, housekeeping
from engine.run.directory import RunDirectory
from engine.run.generations import Generation, Ref
from engine.run.objects import read_object
from engine.run.usable import most_blocks, newest_usable

SETTINGS: dict[str, object] = {
    "block_ap.sequences": 16,
    "block_ap.epochs": 4,
    "e2e_qp.sequences": 10,
    "e2e_qp.epochs": 3,
    "runtime.checkpoint_minutes": 1e-4,
    "runtime.checkpoint_share": 1.0,
    "runtime.streams": "stored",
}
BAD = ("accepted with other content", "less, and not a word", "lost")


@dataclass(frozen=True)
class Flip:
    """One bit of one file."""

    path: Path
    bit: int

    @contextmanager
    def done(self) -> Iterator[None]:
        """Inside, the bit is another."""
        content = self.path.read_bytes()
        changed = bytearray(content)
        changed[self.bit // 8] ^= 1 << self.bit % 8
        self.path.write_bytes(changed)
        yield
        self.path.write_bytes(content)


def flips(directory: Path, chance: random.Random) -> Iterator[Flip]:
    """Bits of the files of a checkpoint: each file as likely as any other, so that the small ones, which say
    what the large ones are, are not left out."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    while True:
        path = chance.choice(files)
        yield Flip(path, chance.randrange(8 * path.stat().st_size))


def committed(directory: Path) -> dict[Ref, Generation]:
    """What lies there before anything is flipped; CURRENT's first."""
    named = generations.current(directory)
    assert named is not None
    refs = [named, *(ref for ref in generations.candidates(directory) if ref != named)]
    return {ref: generations.read(directory, ref) for ref in refs}


def verdict(directory: Path, before: Mapping[Ref, Generation]) -> str:
    """What is made of a checkpoint that was ``before`` until a bit flipped."""
    whole = next(iter(before.values()))
    try:
        found = newest_usable(directory)
        shared = most_blocks(directory, 2).generation
    except EqatError:
        return "lost"
    if found is None:
        return "lost"
    if not any(is_part_of(shared, original) for original in before.values()):
        return "accepted with other content"
    for digest in found.generation.entries.values():
        read_object(directory, digest)
    if same(found.generation, whole):
        return "whole, and said that something is damaged" if found.warnings else "whole"
    if not found.warnings:
        return "less, and not a word"
    if any(same(found.generation, original) for original in before.values()):
        return "the generation before"
    if any(is_part_of(found.generation, original) for original in before.values()):
        return "a part, the rest is trained again"
    return "accepted with other content"


def same(found: Generation, original: Generation) -> bool:
    """NaN is compared, too."""
    return repr(found) == repr(original)


def is_part_of(found: Generation, original: Generation) -> bool:
    """Whether everything in ``found`` is in ``original``, unchanged."""
    return (
        found.identity == original.identity
        and found.entries.items() <= original.entries.items()
        and all(repr(original.facts.get(name)) == repr(value) for name, value in found.facts.items())
    )


def standing(folder: Path) -> dict[str, RunDirectory]:
    """Runs as they may stand when a bit flips, by the words for it."""
    runs = {"done": make_run(folder, SETTINGS)}
    child = start(runs["done"])
    assert child.code() == 0, output(runs["done"])
    for phase, least in (("block_ap", 2), ("e2e_qp", 1)):
        run = runs[f"stopped inside {phase}"] = make_run(folder, SETTINGS)
        child = start(run, before=snapshots_at_any_cost)
        child.until(lambda run=run, phase=phase, least=least: _is_inside(run, phase, least))
        child.send(signal.SIGTERM)
        assert child.code() == 75, output(run)
    runs["done and cleaned"] = copied(runs["done"])
    housekeeping.clean_run(runs["done and cleaned"])
    return runs


def _is_inside(run: RunDirectory, phase: str, least: int) -> bool:
    """Whether a training of the phase (of a block that is not the first) has been checkpointed."""
    return any(
        e.phase == phase and e.step and (e.block is None or e.block >= least)
        for e in of(run, events.CheckpointCommitted)
    )


def copied(run: RunDirectory) -> RunDirectory:
    """The same run once more."""
    number = sum(path.name.startswith(run.id) for path in run.path.parent.iterdir())
    place = run.path.with_name(f"{run.id}-{number}")
    shutil.copytree(run.path, place)
    return RunDirectory.open(place)


@dataclass(frozen=True)
class Flipped:
    """What was made of one flip."""

    state: str
    file: str
    bit: int
    verdict: str


def flip_all(runs: Mapping[str, RunDirectory], count: int, seed: int) -> Iterator[Flipped]:
    """``count`` flips, spread over the runs."""
    chance = random.Random(seed)
    before = {state: committed(run.checkpoints_dir) for state, run in runs.items()}
    sources = {state: flips(run.checkpoints_dir, chance) for state, run in runs.items()}
    states = list(runs)
    for number in range(count):
        state = states[number % len(states)]
        flip = next(sources[state])
        with flip.done():
            found = verdict(runs[state].checkpoints_dir, before[state])
        yield Flipped(state, flip.path.name, flip.bit, found)


def flip_soak(count: int, seed: int, folder: Path | None = None) -> tuple[Counter[str], list[Flipped]]:
    """How often each verdict was passed, and the flips that were not survived; in a folder of its own, unless
    one is given."""
    with tempfile.TemporaryDirectory() as own:
        place = folder or Path(own)
        os.environ.setdefault("EQAT_CACHE_DIR", f"{place}/cache")
        found = list(flip_all(standing(place / "runs"), count, seed))
    return Counter(flipped.verdict for flipped in found), [each for each in found if each.verdict in BAD]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts, bad = flip_soak(args.flips, args.seed)
    for words, count in counts.most_common():
        print(f"{count:6} {words}")
    for flipped in bad:
        print(f"NOT SURVIVED: {flipped}")
    print(f"{sum(counts.values())} flips, {len(bad)} not survived")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
