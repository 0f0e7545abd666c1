"""The plan's disk against a real run's: what the directory held at its fullest."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_runs import make_run, of, output, start

from engine.run import events
from engine.run.directory import RunDirectory

Make = Callable[..., RunDirectory]


def held(folder: Path) -> int:
    """Bytes of all files below ``folder``, as far as they are still there."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


class Watch(threading.Thread):
    """Looks at a folder again and again and keeps the most that it held."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.stop = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            self.most = max(self.most, held(self.folder))
            time.sleep(0.002)


# Few log lines and large blocks: what is planned is tensors, and they should be most of what there is.
SETTINGS = {
    "block_ap.sequences": 64,
    "block_ap.sequence_length": 128,
    "block_ap.batch_size": 8,
    "e2e_qp.sequences": 8,
    "evaluation.windows": 2,
}


@pytest.mark.parametrize("streams", ["stored", "recomputed"])
def test_plan_predicts_the_disk_within_10_percent(tmp_path: Path, streams: str) -> None:
    run = make_run(tmp_path / "runs", {**SETTINGS, "runtime.streams": streams})
    watch = Watch(run.path)
    watch.start()
    assert start(run).code() == 0, output(run)
    watch.stop.set()
    watch.join()
    (plan,) = [event.plan for event in of(run, events.Plan)]
    planned = max(phase["peak_disk_bytes"] for phase in plan["phases"])
    assert watch.most == pytest.approx(planned, rel=0.10)
    assert plan["disk_bytes"] >= planned
