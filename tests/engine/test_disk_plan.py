"""The plan's disk against a real run's: what the directory held at its fullest."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_runs import make_run, of, output, start

from engine.run import events

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
    fullest = tmp_path / "fullest"
    assert start(run, fullest=fullest).code() == 0, output(run)
    (plan,) = [event.plan for event in of(run, events.Plan)]
    planned = max(phase["peak_disk_bytes"] for phase in plan["phases"])
    assert int(fullest.read_text()) == pytest.approx(planned, rel=0.10)
    assert plan["disk_bytes"] >= planned
