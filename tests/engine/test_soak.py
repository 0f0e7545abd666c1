"""A short soak; ``make soak`` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import Row, soak, table


def test_whatever_is_killed_at_random_instants_the_export_is_the_same_and_no_run_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = soak(tmp_path, kills=2, tasks=1, beside=1, flips=0, seed=1000)
    assert [fault for row in rows for fault in row.faults] == []
    assert all(row.struck for row in rows if "bit" not in row.what), table(rows)


def test_the_table_of_the_soak_counts_what_struck_and_what_did_harm() -> None:
    row = Row("run, killed", tries=3, struck=2, seconds=61.4, note="in e2e_qp")
    row.check(True, "never said")
    row.check(False, "seed 7: another export")
    assert row.faults == ["seed 7: another export"]
    assert table([row]).splitlines()[-1].split() == [*["run,", "killed", "3", "2", "1", "61", "in", "e2e_qp"]]
