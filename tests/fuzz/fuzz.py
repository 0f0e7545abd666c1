"""Mutate every file that eqat reads, do with it what a user would, and look for what must never happen.

    python tests/fuzz/fuzz.py --seconds 300 --seed 0          (make fuzz)
    python tests/fuzz/fuzz.py --only run,links --seconds 60
    python tests/fuzz/fuzz.py --seed 0 --case links-17        one case again

Runs in every state, models as folders and as GGUF files, configurations, texts and logs are made by real
engines and then mutated (``target_*.py``). Commands, engines and the app work on them, each in a process of
its own with limits, without a network, and watched (``sandbox.py``, ``watch.py``). What is a fault is in
``oracles.py``. The same seed and number give the same case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TARGETS = ("run", "links", "model", "packed", "gguf", "toml", "text", "log")
Case = tuple[str, int, int]
"""Target, seed, number."""


@dataclass
class Findings:
    """What became of all cases."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    operations: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    faulty: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def take(self, answer: dict[str, Any]) -> None:
        """Count a case."""
        name = answer["target"]
        self.answers.append(answer)
        self.outcomes[name][answer["outcome"]] += 1
        self.operations[name] += len(answer["codes"])
        self.seconds[name] += answer["seconds"]
        self.kinds[name].update({fault["kind"] for fault in answer["faults"]})
        if answer["faults"]:
            self.faulty.append(answer)

    def table(self) -> str:
        """A line for each target, and one for all."""
        rows = [("target", "cases", "operations", "ok", "refused", "faulty", "seconds", "exit codes; faults")]
        for name in [name for name in TARGETS if name in self.outcomes]:
            found = self.outcomes[name]
            codes = {
                key.split()[1]: count for key, count in sorted(found.items()) if key.startswith("refused")
            }
            words = ", ".join(f"{code}: {count}" for code, count in codes.items())
            words += "".join(f"; {kind}: {count}" for kind, count in sorted(self.kinds[name].items()))
            rows.append(
                (
                    name,
                    str(found.total()),
                    str(self.operations[name]),
                    str(found["ok"]),
                    str(sum(codes.values())),
                    str(found["FAULT"]),
                    f"{self.seconds[name]:.0f}",
                    words,
                )
            )
        columns = list(zip(*((*row[1:-1],) for row in rows[1:]), strict=True))
        sums = [str(sum(map(int, column))) for column in columns]
        rows.append(("all", *sums, ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                (
                    row[0].ljust(widths[0]),
                    *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=False)),
                    row[-1],
                )
            )
            for row in rows
        )


def told(answer: dict[str, Any]) -> str:
    """A faulty case in words, with the line that repeats it."""
    faults = [f"  {fault['kind']}: {fault['operation']}\n    {fault['detail']}" for fault in answer["faults"]]
    again = f"python tests/fuzz/fuzz.py --seed {answer['seed']} --case {answer['target']}-{answer['number']}"
    return "\n".join((f"FAULT {answer['mutation'][:300]}", *faults, f"  {again}"))


# -- doing it ------------------------------------------------------------------------------------------


def fuzz(cases: Iterable[Case], workers: int, *, speak: bool = True) -> Findings:
    """Do ``cases``; ends when they do.

    Raises:
        RuntimeError: when a worker breaks, which is a bug of the fuzzer.
    """
    findings = Findings()
    waiting = iter(cases)
    lock = threading.Lock()
    answers: queue.Queue[dict[str, Any]] = queue.Queue()

    def next_case() -> Case | None:
        with lock:
            return next(waiting, None)

    with tempfile.TemporaryDirectory(prefix="eqat-fuzz-") as folder:
        threads = [
            threading.Thread(target=_serve, args=(Path(folder) / f"w{index}", next_case, answers))
            for index in range(workers)
        ]
        for thread in threads:
            thread.start()
        left = workers
        while left:
            answer = answers.get()
            if "broken" in answer:
                raise RuntimeError(f"{answer.get('target')}-{answer.get('number')}: {answer['broken']}")
            if "ended" in answer:
                left -= 1
                continue
            findings.take(answer)
            if speak and answer["faults"]:
                print(told(answer), flush=True)
    return findings


def _serve(folder: Path, next_case: Any, answers: queue.Queue[dict[str, Any]]) -> None:
    """A worker process and the thread that hands it its cases."""
    worker = subprocess.Popen(
        [sys.executable, str(HERE / "worker.py"), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    case: Case | None = None
    try:
        while True:
            line = worker.stdout.readline()
            if not line:
                answers.put({"broken": f"the worker ended with {worker.wait()} in {case}"})
                return
            answer = json.loads(line)
            if "ready" not in answer:
                answers.put(answer)
            case = next_case()
            if case is None:
                return
            worker.stdin.write(" ".join(map(str, case)) + "\n")
            worker.stdin.flush()
    finally:
        worker.stdin.close()
        worker.wait()
        answers.put({"ended": True})


def until(seconds: float, cases: Iterator[Case]) -> Iterator[Case]:
    """Cases until so much time is over."""
    deadline = time.monotonic() + seconds
    return itertools.takewhile(lambda case: time.monotonic() < deadline, cases)


def every(targets: Iterable[str], seed: int) -> Iterator[Case]:
    """Case 0 of every target, then case 1, and so on."""
    names = list(targets)
    return ((name, seed, number) for number in itertools.count() for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(TARGETS), help="targets, with commas between")
    parser.add_argument("--case", help="one case, as TARGET-NUMBER")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args()
    if args.case:
        name, _, number = args.case.rpartition("-")
        cases: Iterable[Case] = [(name, args.seed, int(number))]
        args.workers = 1
    else:
        cases = until(args.seconds, every(args.only.split(","), args.seed))
    findings = fuzz(cases, args.workers)
    print(findings.table())
    return 1 if findings.faulty else 0


if __name__ == "__main__":
    sys.exit(main())
