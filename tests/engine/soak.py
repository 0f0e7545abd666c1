"""Kill and damage real runs, again and again; whatever happens, the export is the same to the bit.

    python tests/engine/soak.py --kills 50 --flips 5000 --seed 0          (make soak)

A small run (four blocks, every phase) is made once without interference. Then, from a seed:

- the same run is started again and again, killed with SIGKILL at random instants, resumed, finished;
- so is a run that redoes a part of the first one, which has to stay as it is;
- exports and evaluations of the finished run are killed: its export is there, whole, at every instant;
- ``gc`` is killed, and works beside a run that trains; ``rm`` is killed, and ``gc`` finishes what it began;
- single bits are flipped anywhere in ``checkpoints/``: no other content is ever accepted, no run is lost.

Every export must equal the first one, file by file, byte by byte. Checkpoints are taken as often as possible.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from soak_housekeeping import soak_gc, soak_gc_beside, soak_rm
from soak_runs import Whole, reference, soak_redos, soak_runs
from soak_tasks import soak_task
from soak_tools import Row


def soak_kills(folder: Path, whole: Whole, kills: int, seed: int) -> Row:
    """Runs that are killed up to three times each."""
    row = Row("run, killed and resumed")
    phases: Counter[str] = Counter()
    inside = 0
    for soaked in soak_runs(folder, whole, kills, seed):
        row.tries += 1
        row.struck += len(soaked.kills)
        row.check(soaked.equal, f"seed {soaked.seed}: another export")
        phases.update(kill.phase for kill in soaked.kills)
        inside += sum(kill.inside for kill in soaked.kills)
    row.note = f"{inside} continued inside a training; " + ", ".join(f"{n} in {p}" for p, n in phases.items())
    return row


def soak_flips(flips: int, seed: int) -> Row:
    """Single bits flipped anywhere in ``checkpoints/``."""
    row = Row("bit flipped in checkpoints/", tries=flips, struck=flips)
    if not flips:
        return row
    from bitflips import flip_soak

    verdicts, not_survived = flip_soak(flips, seed)
    row.tries = row.struck = sum(verdicts.values())
    row.faults += [str(flip) for flip in not_survived]
    row.note = ", ".join(f"{count} {words}" for words, count in verdicts.most_common())
    return row


def soak(folder: Path, *, kills: int, tasks: int, beside: int, flips: int, seed: int) -> list[Row]:
    """All of it: ``kills`` of runs, ``tasks`` of each command, ``beside`` runs with gc beside them."""
    whole = reference(folder / "runs")
    print(f"uninterrupted: {whole.seconds:.1f} s", flush=True)
    parts: list[Callable[[], Row]] = [
        lambda: soak_kills(folder / "runs", whole, kills, seed),
        lambda: soak_redos(whole, tasks, seed),
        lambda: soak_task("export", whole, 2 * tasks, seed),
        lambda: soak_task("eval", whole, tasks, seed),
        lambda: soak_gc(folder, whole, tasks, seed),
        lambda: soak_gc_beside(folder / "beside", whole, beside),
        lambda: soak_rm(folder, whole, 2 * tasks, seed),
        lambda: soak_flips(flips, seed),
    ]
    return [_timed(part) for part in parts]


def _timed(part: Callable[[], Row]) -> Row:
    began = time.monotonic()
    row = part()
    row.seconds = time.monotonic() - began
    print(f"{row.what}: {row.struck} in {row.seconds:.0f} s, {len(row.faults)} faults", flush=True)
    for fault in row.faults:
        print(f"  FAULT {fault}", flush=True)
    return row


def table(rows: list[Row]) -> str:
    """A line for each kind of interruption."""
    lines = [("interruption", "tries", "struck", "faults", "seconds", "")]
    lines += [
        (row.what, str(row.tries), str(row.struck), str(len(row.faults)), f"{row.seconds:.0f}", row.note)
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join(
            (line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, 5)), line[5])
        ).rstrip()
        for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of runs")
    parser.add_argument(
        "--tasks", type=int, default=20, help="kills of redo, eval and gc, half those of export and rm"
    )
    parser.add_argument("--beside", type=int, default=5, help="runs that train while gc runs")
    parser.add_argument("--flips", type=int, default=5000, help="bits")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="eqat-soak-") as folder:
        os.environ["EQAT_CACHE_DIR"] = f"{folder}/cache"
        rows = soak(
            Path(folder),
            kills=args.kills,
            tasks=args.tasks,
            beside=args.beside,
            flips=args.flips,
            seed=args.seed,
        )
    faults = sum(len(row.faults) for row in rows)
    print(table(rows))
    struck = sum(row.struck for row in rows)
    print(f"{struck} interruptions in {time.monotonic() - began:.0f} s, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
