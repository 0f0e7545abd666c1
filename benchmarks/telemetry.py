"""What events, telemetry and offered checkpoints cost a Block-AP step, and whether a step waits for the GPU.

    python benchmarks/telemetry.py Llama-2-7B

The same training of one block, in turns with a progress that does nothing and with what a run uses: an event
log, the status file, readings of memory and GPU once a second, a checkpoint offered at every step (none is
due). "waits" are the places in a step at which torch says that the host waits for the GPU, over steps in
which no metric is written.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from block_step import BATCHES, GRID, VARIANTS, settings
from common import DEVICE, SHAPES, Marks, dtype, median_of, model, random_block, random_store, table, where

from engine import telemetry
from engine.checkpoints.commits import Checkpoints
from engine.checkpoints.snapshots import SnapshotKeeper, resumable
from engine.checkpoints.store import CheckpointStore
from engine.config.model import ModelConfig
from engine.config.run import RunConfig
from engine.config.runtime import RuntimeConfig
from engine.methods.blockwise.block_ap import train_block
from engine.methods.blockwise.reconstruction import Streams
from engine.reporter import Reporter
from engine.run.directory import RunDirectory


class Telling(Marks):
    """Marks steps and passes everything on to those whom a run's training talks to."""

    def __init__(self, report: Reporter, keeper: SnapshotKeeper) -> None:
        super().__init__()
        self._report, self._keeper = report, keeper

    def due(self) -> bool:
        return self._report.due()

    def metric(self, **values: Any) -> None:
        self._report.metric(**values)

    def leave_if_asked(self) -> None:
        self._report.leave_if_asked()

    def step_boundary(self, state: Any) -> None:
        super().step_boundary(state)
        self._keeper.step_boundary(state)


class Waiting(Marks):
    """Counts what torch says about waiting, in steps ``first`` to ``last``."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self._first, self._last, self.places = first, last, set[str]()
        self.count = 0
        self._caught = warnings.catch_warnings(record=True)

    def step_boundary(self, state: Any) -> None:
        super().step_boundary(state)
        if len(self.events) == self._first:
            self._heard = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif len(self.events) == self._last:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            told = [w for w in self._heard or () if "called a synchronizing" in str(w.message)]
            self.count = len(told)
            self.places = {f"{Path(w.filename).name}:{w.lineno}" for w in told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("shape", nargs="?", default="Llama-2-7B", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    batch, length = BATCHES.get(args.shape, (2, 2048))
    lm = model(SHAPES[args.shape])
    rows = 32 * batch
    streams = Streams(*(random_store("device", rows, length, lm.hidden_size, seed) for seed in (0, 1)), rows)
    config = settings(rows, batch, length, epochs=-(-args.steps * batch // rows))
    form = VARIANTS["fast" if DEVICE.type == "cuda" else "plain"]

    def train(marks: Marks) -> float:
        block = copy.deepcopy(random_block(args.shape)).to(DEVICE)
        train_block(
            *(lm, 0, block, streams, config, GRID),
            seed=0,
            dtype=dtype(),
            progress=marks,
            keeper=marks,
            **form,
        )
        return statistics.median(marks.steps())

    silent, telling = [], []
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(Path(folder), RunConfig(model=ModelConfig(source="random")))
        report = Reporter(run, 1, DEVICE)
        report.begin(["block_ap"], {"block_ap": 100.0})
        readings = telemetry.Telemetry(DEVICE, run.path, report.emit)
        store = CheckpointStore(run.checkpoints_dir, {"what": "benchmark"})
        checkpoints = Checkpoints(store, report, RuntimeConfig())
        train(Marks())
        with report.phase("block_ap"):
            for _ in range(args.repeat):
                silent.append(train(Marks()))
                report.block_started(0, 1)
                with resumable(checkpoints, "block_ap", 0) as keeper:
                    telling.append(train(Telling(report, keeper)))
        readings.close()
        report.close()
        size = run.events_path.stat().st_size
    waiting = Waiting(10, 20)  # inside the first epoch: at its end the host waits, to validate
    if DEVICE.type == "cuda":
        train(waiting)
    more = statistics.median(telling) / statistics.median(silent) - 1
    table(
        "block | silent, ms a step | as in a run | more | waits in 10 steps",
        [
            [
                args.shape,
                median_of(silent, ".3f"),
                median_of(telling, ".3f"),
                f"{more:+.2%}",
                f"{waiting.count} {', '.join(sorted(waiting.places))}".strip(),
            ]
        ],
    )
    print(f"{args.steps} steps, {size / 1e3:.0f} KB of events; {where()}")


if __name__ == "__main__":
    main()
