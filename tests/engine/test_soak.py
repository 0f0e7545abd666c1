"""A short soak; ``make soak`` is the long one."""

from __future__ import annotations

from pathlib import Path

from soak import soak


def test_runs_killed_at_random_instants_export_the_same_bytes(tmp_path: Path) -> None:
    soaked = list(soak(tmp_path, kills=4, seed=1000))
    assert [run.seed for run in soaked if not run.equal] == []
    assert sum(len(run.kills) for run in soaked) >= 4
