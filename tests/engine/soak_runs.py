"""Runs, and redone parts of runs, that are killed at random instants, resumed and compared."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine_runs import exported, log, make_run, of, output, start, wait_until
from soak_tools import Row, contents

from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.run.redo import make_redo

SETTINGS: dict[str, object] = {
    "block_ap.sequences": 16,
    "block_ap.epochs": 6,
    "e2e_qp.sequences": 12,
    "e2e_qp.epochs": 4,
    "runtime.checkpoint_minutes": 1e-4,
    "runtime.checkpoint_share": 1.0,
}
LATEST_KILL = 1.0
"""In durations of the whole run."""
MOST_KILLS_OF_A_RUN = 3
REDO_FROM, REDO_SETTINGS = 2, {"block_ap.epochs": 4}
"""Half of the blocks are trained again, in another way."""


@dataclass(frozen=True)
class Whole:
    """A run that nobody interfered with."""

    run: RunDirectory
    export: dict[str, str]
    """SHA-256 of every exported file."""
    seconds: float


@dataclass(frozen=True)
class Kill:
    """Where a kill struck."""

    phase: str
    inside: bool
    """Whether the attempt after it went on inside a block or inside end-to-end training."""


@dataclass(frozen=True)
class Soaked:
    """One run that was killed and finished."""

    seed: int
    kills: list[Kill]
    equal: bool


def reference(folder: Path) -> Whole:
    """What is exported without interference, and how long that takes."""
    begin = 0.0
    for _ in range(2):  # the first process waits for its libraries to be imported
        run = make_run(folder, SETTINGS)
        begin = finish(run)
    return Whole(run, exported(run), time.monotonic() - begin)


def finish(run: RunDirectory) -> float:
    """An attempt that must end well; when it began to work."""
    child = start(run)
    wait_until(lambda: run_state(run) == "running" or not child.alive())
    begin = time.monotonic()
    code = child.code()
    assert code == 0, f"{run.id} ended with {code}; {output(run)}"
    return begin


def soak_run(run: RunDirectory, seed: int, whole: Whole, most: int) -> Soaked:
    """Kill a run up to ``most`` times, let it finish, compare."""
    chance = random.Random(seed)
    phases = []
    for _ in range(chance.randint(1, most)):
        child = start(run)
        wait_until(lambda child=child: run_state(run) == "running" or not child.alive())
        time.sleep(chance.uniform(0, LATEST_KILL * whole.seconds))
        if child.alive():
            child.kill()
            phases.append(last_phase(run))
        child.code()
    finish(run)
    continued = {attempt for attempt, _ in continuations(run)}
    kills = [Kill(phase, attempt + 1 in continued) for attempt, phase in enumerate(phases, start=1)]
    return Soaked(seed, kills, exported(run) == whole.export)


def last_phase(run: RunDirectory) -> str:
    """The phase that the run was in when it was last heard of."""
    started = of(run, events.PhaseStarted)
    return started[-1].phase if started else "start"


def continuations(run: RunDirectory) -> Iterator[tuple[int, str]]:
    """Attempts whose first metric of a block, or of the end-to-end training, is not step 1."""
    first: dict[tuple[int, str, int | None], events.Metric] = {}
    for event in log(run):
        if isinstance(event, events.Metric) and event.val_loss is None:
            first.setdefault((event.attempt, event.phase, event.block), event)
    for (attempt, phase, _), metric in first.items():
        if metric.step > 1 and attempt > 1:
            yield attempt, phase


def soak_runs(
    folder: Path, whole: Whole, kills: int, seed: int, most: int = MOST_KILLS_OF_A_RUN
) -> Iterator[Soaked]:
    """Runs, until so many kills have struck. Every other run stores its activation streams, the others
    compute them again."""
    struck = 0
    while struck < kills:
        run = make_run(folder, {**SETTINGS, "runtime.streams": ("stored", "recomputed")[seed % 2]})
        soaked = soak_run(run, seed, whole, most)
        struck += len(soaked.kills)
        seed += 1
        yield soaked


def soak_redos(whole: Whole, kills: int, seed: int) -> Row:
    """Half a run is done again and killed meanwhile; the run that it is made from stays as it is."""
    row = Row("redo, killed and resumed")
    if not kills:
        return row
    before = contents(whole.run.path)
    undisturbed = make_redo(whole.run, REDO_FROM, REDO_SETTINGS)
    begin = finish(undisturbed)
    redone = Whole(undisturbed, exported(undisturbed), time.monotonic() - begin)
    row.check(redone.export != whole.export, "other settings changed nothing: there is nothing to compare")
    while row.struck < kills:
        soaked = soak_run(make_redo(whole.run, REDO_FROM, REDO_SETTINGS), seed, redone, most=2)
        row.tries += 1
        row.struck += len(soaked.kills)
        row.check(soaked.equal, f"seed {seed}: another export")
        row.check(contents(whole.run.path) == before, f"seed {seed}: the origin has changed")
        seed += 1
    return row
