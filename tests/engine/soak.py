"""Kill real runs at random instants, again and again; whatever happens, the export is the same to the bit.

    python tests/engine/soak.py --kills 50 --seed 0          (make soak)

A small run (four blocks, every phase) is made once without interference. Then the same run is started again
and again, each time killed with SIGKILL at an instant drawn from a seed, resumed, perhaps killed once more,
and finished; its export must equal the first one's, file by file, byte by byte. Checkpoints are taken as
often as possible. Every other run stores its activation streams, the others compute them again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine_runs import exported, log, make_run, of, output, start, wait_until

from engine.run import events
from engine.run.directory import RunDirectory, run_state

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


def reference(folder: Path) -> tuple[dict[str, str], float]:
    """What is exported without interference, and how long that takes."""
    begin = 0.0
    for _ in range(2):  # the first process waits for its libraries to be imported
        run = make_run(folder, SETTINGS)
        child = start(run)
        wait_until(lambda child=child, run=run: run_state(run) == "running" or not child.alive())
        begin = time.monotonic()
        assert child.code() == 0, output(run)
    return exported(run), time.monotonic() - begin


def soak_one(folder: Path, seed: int, whole: dict[str, str], duration: float, most: int) -> Soaked:
    """Kill a run up to ``most`` times, let it finish, compare."""
    chance = random.Random(seed)
    run = make_run(folder, {**SETTINGS, "runtime.streams": ("stored", "recomputed")[seed % 2]})
    phases = []
    for _ in range(chance.randint(1, most)):
        child = start(run)
        wait_until(lambda child=child: run_state(run) == "running" or not child.alive())
        time.sleep(chance.uniform(0, LATEST_KILL * duration))
        if child.alive():
            os.kill(child.pid, signal.SIGKILL)
            phases.append(last_phase(run))
        child.code()
    code = start(run).code()
    assert code == 0, f"seed {seed}: the last attempt ended with {code}; {output(run)}"
    continued = {attempt for attempt, _ in continuations(run)}
    kills = [Kill(phase, attempt + 1 in continued) for attempt, phase in enumerate(phases, start=1)]
    return Soaked(seed, kills, exported(run) == whole)


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


def soak(folder: Path, kills: int, seed: int, most: int = MOST_KILLS_OF_A_RUN) -> Iterator[Soaked]:
    """Runs, until so many kills have struck."""
    whole, duration = reference(folder)
    print(f"uninterrupted: {duration:.1f} s", flush=True)
    struck = 0
    while struck < kills:
        soaked = soak_one(folder, seed, whole, duration, most)
        struck += len(soaked.kills)
        seed += 1
        yield soaked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    struck: Counter[str] = Counter()
    inside = 0
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EQAT_CACHE_DIR"] = f"{folder}/cache"
        for soaked in soak(Path(folder) / "runs", args.kills, args.seed):
            where = ", ".join(f"{kill.phase}{' (continued inside)' * kill.inside}" for kill in soaked.kills)
            print(
                f"seed {soaked.seed}: {'equal' if soaked.equal else 'DIFFERENT'}; killed in {where}",
                flush=True,
            )
            struck.update(kill.phase for kill in soaked.kills)
            inside += sum(kill.inside for kill in soaked.kills)
            if not soaked.equal:
                failed.append(soaked.seed)
    print(
        f"{sum(struck.values())} kills in {time.monotonic() - began:.0f} s: {dict(struck)}; {inside} inside"
    )
    print(f"different: seeds {failed}" if failed else "every export is equal to the last byte")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
