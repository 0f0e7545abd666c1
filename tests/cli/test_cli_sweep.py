"""Sweeps: the plan of all runs, making them one after the other, what ends that, going on, and the table."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest
from cli_tools import Eqat, at_work, ended, follows, handles, runs_at_work, start_eqat
from waiting import PATIENCE, wait_until

from engine.config.loading import load
from engine.config.sweeps import combinations, typed_axis
from engine.errors import PreflightError
from engine.plan.several import plan_several
from engine.run.directory import RunDirectory
from engine.run.finding import list_runs
from engine.run.liveness import run_state
from engine.run.lock import holder, is_held
from engine.run.state import load_state
from engine.run.sweep import Sweep, find_sweep
from eqat_tui import sweeping
from eqat_tui.configure import typed_settings

TWO = ("sweep", "smoke", "--device", "cpu", "--sweep", "grid.bits=2,3")
THREE = (*TWO[:-1], "grid.bits=2,3,4")
SMALL = (
    *("--set", "block_ap.sequences=4", "--set", "block_ap.epochs=1", "--set", "block_ap.val_sequences=0"),
    *("--set", "e2e_qp.enabled=false", "--set", "evaluation.windows=2"),
)
pytestmark = pytest.mark.usefixtures("no_engine_outlives_its_test")


def made_of_two(where: Path) -> Sweep:
    """A sweep none of whose runs is made."""
    swept = combinations(load("smoke"), [typed_axis("grid.bits=2,3")])
    return Sweep.create(where / "runs", "smoke", swept)


def the_sweep(where: Path) -> Sweep:
    return find_sweep(where / "runs", "latest")


def outcomes(eqat: Eqat) -> list[str]:
    shown = eqat("sweep", "show", "latest", "--json")
    assert shown.returncode == 0, shown.stderr
    return [row["outcome"] for row in json.loads(shown.stdout)["runs"]]


# -- the plan ------------------------------------------------------------------------------------------


def test_each_run_is_of_as_many_gpus_as_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sweeping.combined("smoke", ["grid.bits=2,3"], typed_settings(gpus=2))
    assert [one.config.runtime.gpus for one in found] == [2, 2]
    monkeypatch.setattr(sweeping, "visible_gpus", lambda: list("0123"))
    shares = sweeping.parts([one.config for one in found], 0)
    assert [share.gpu for share in shares] == ["0,1", "2,3"]


def test_gpus_of_a_sweep_are_typed_as_those_of_a_run(eqat: Eqat) -> None:
    planned = eqat(*THREE, "--gpus", "2", "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    refused = eqat(*THREE, "--gpus", "3", "--dry-run")
    assert (refused.returncode, "cannot be shared out evenly over 3 GPUs" in refused.stderr) == (2, True)


def test_the_plan_is_of_all_runs_together_and_starts_nothing(eqat: Eqat, tmp_path: Path) -> None:
    planned = eqat(*THREE, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    tree = json.loads(planned.stdout)
    plans = [run["plan"] for run in tree["runs"]]
    assert [run["settings"] for run in tree["runs"]] == [{"grid.bits": bits} for bits in (2, 3, 4)]
    alone = json.loads(eqat("plan", "smoke", "--device", "cpu", "--bits", "3", "--json").stdout)
    assert (plans[1]["seconds"], plans[1]["disk_bytes"]) == (alone["seconds"], alone["disk_bytes"])
    assert tree["seconds"] == pytest.approx(sum(plan["seconds"] for plan in plans))
    # Those before have left what they keep while the last one grows to its peak.
    largest = max(plan["disk_bytes"] for plan in plans)
    assert largest < tree["disk_bytes"] <= sum(plan["disk_bytes"] for plan in plans)
    assert sum(plan["export_bytes"] for plan in plans) < tree["kept_bytes"] <= tree["disk_bytes"]
    text = eqat(*THREE, "--dry-run").stdout
    assert "3 runs one after the other" in text
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_is_named_with_its_run(eqat: Eqat) -> None:
    swept = (*TWO, "--sweep", "runtime.host_memory_gib=0,0.001", "--dry-run")
    planned = eqat(*swept)
    assert planned.returncode == 3
    assert "2 of 4 runs one after the other" in planned.stdout
    assert "does not fit: run 2 (grid.bits=2, runtime.host_memory_gib=0.001): " in planned.stdout
    assert "does not fit: run 4 (grid.bits=3, runtime.host_memory_gib=0.001): " in planned.stdout
    (line,) = planned.stderr.splitlines()
    assert line.startswith("error: run 2 (grid.bits=2, ")
    as_json = eqat(*swept, "--json")
    assert as_json.returncode == 3
    assert [len(run["obstacles"]) for run in json.loads(as_json.stdout)["runs"]] == [0, 1, 0, 1]


def test_runs_that_fit_alone_and_not_together_are_refused(tmp_path: Path) -> None:
    config = load("smoke", overrides={"runtime.device": "cpu"})
    plans = plan_several([config] * 3, tmp_path)
    plans.check_together()
    alone = plans.runs[0].plan
    assert alone is not None
    room = msgspec.structs.replace(plans, disk_free=alone.disk_bytes + 1)
    two = plan_several([config] * 3, tmp_path, 2)
    assert two.seconds == pytest.approx(2 * alone.seconds)
    assert alone.disk_bytes < plans.disk_bytes < two.disk_bytes <= 3 * alone.disk_bytes
    tight = msgspec.structs.replace(alone.machine, host_free=alone.peak_host_bytes + 1)
    crowd = [
        msgspec.structs.replace(run, plan=msgspec.structs.replace(alone, machine=tight)) for run in two.runs
    ]
    with pytest.raises(PreflightError, match=r"host memory: 2 runs at a time need"):
        msgspec.structs.replace(two, runs=tuple(crowd)).check_together()
    with pytest.raises(PreflightError, match=r"disk: all runs together need .* and .* are free"):
        room.check_together()


def test_where_no_run_fits_nothing_is_made(eqat: Eqat, tmp_path: Path) -> None:
    refused = eqat(*TWO, "--model", "/no/such/model")
    assert refused.returncode == 3
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: run 1 (grid.bits=2): /no/such/model: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sweep", "smoke"), "nothing is swept"),
        (("sweep", "smok", "--sweep", "grid.bits=2,3"), "there is no preset 'smok'"),
        ((*TWO, "--bits", "3"), "grid.bits: is set and swept"),
        (("sweep", "show", "latest"), "there is no sweep 'latest'"),
        (("sweep", "resume", "."), "is not the folder of a sweep"),
        (("sweep", "show", ""), "names no sweep"),
    ],
)
def test_mistakes_are_one_line(eqat: Eqat, arguments: tuple[str, ...], words: str) -> None:
    refused = eqat(*arguments)
    (line,) = refused.stderr.splitlines()
    assert (refused.returncode, words in line) == (2, True), line


def test_the_help_says_how_a_sweep_is_begun(eqat: Eqat) -> None:
    assert "eqat sweep PRESET|FILE --sweep grid.bits=2,3,4" in eqat("sweep", "--help").stdout
    for arguments in (("sweep", "start", "-h"), ("sweep", "smoke", "--help")):
        assert "--sweep KEY=VALUE" in " ".join(eqat(*arguments).stdout.split())


# -- real runs -----------------------------------------------------------------------------------------


def test_real_runs_are_made_and_compared_and_none_is_made_twice(eqat: Eqat, tmp_path: Path) -> None:
    file = tmp_path / "three.toml"
    file.write_text('extends = "smoke"\n[sweep]\n"grid.bits" = [3]\n"data.source" = ["builtin", "a,b.txt"]\n')
    (tmp_path / "a,b.txt").write_text("too short")
    made = eqat("sweep", "three.toml", "--device", "cpu", *SMALL, "--json")
    assert made.returncode == 4, made.stderr  # of the first that failed
    rows = json.loads(made.stdout)["runs"]
    assert [row["outcome"] for row in rows] == ["done", "failed"]
    assert rows[1]["settings"] == {"grid.bits": 3, "data.source": "a,b.txt"}
    for row in rows:
        shown = json.loads(eqat("show", row["id"], "--json").stdout)
        assert (shown["state"], shown["perplexity"]) == (row["outcome"], row["perplexity"])
        assert shown["config"]["grid"]["bits"] == row["settings"]["grid.bits"]
    assert rows[1]["error"]["exit_code"] == 4

    table = eqat("sweep", "show", "three")
    assert "1 of 2 done" in table.stdout
    assert f"2: {rows[1]['error']['where']}: {rows[1]['error']['message']}" in table.stdout
    cells = list(csv.DictReader(eqat("sweep", "show", "latest", "--csv").stdout.splitlines()))
    assert [float(line["perplexity.block_ap"] or 0) for line in cells] == [
        row["perplexity"].get("block_ap") or 0 for row in rows
    ]
    assert [line["data.source"] for line in cells] == ["builtin", "a,b.txt"]
    assert (int(cells[0]["bytes"]), cells[1]["outcome"]) == (rows[0]["size_bytes"]["quantized"], "failed")
    markdown = eqat("sweep", "show", "latest", "--markdown").stdout.splitlines()
    assert [line.count("|") for line in markdown] == [markdown[0].count("|")] * 4
    assert eqat("sweep", "show", "latest", "--csv", "--markdown").returncode == 2

    # Once the text is there the failed ones go on in the runs that they have; the file is not asked again.
    file.unlink()
    (tmp_path / "a,b.txt").write_text("Some more words, all of them different. " * 400)
    again = eqat("sweep", "resume", "latest", "--json")
    after = json.loads(again.stdout)["runs"]
    assert (again.returncode, [row["outcome"] for row in after]) == (0, ["done"] * 2), again.stderr
    assert [row["id"] for row in after] == [row["id"] for row in rows]
    attempts = [load_state(RunDirectory.open(tmp_path / "runs" / row["id"])).attempt for row in after]
    assert attempts == [1, 2]
    assert eqat("sweep", "resume", "latest").returncode == 0


def test_the_shipped_sweep_of_all_methods_runs(eqat: Eqat) -> None:
    """``smoke-methods``, as it is: every method trains, is exported, and stands in the table."""
    made = eqat("sweep", "smoke-methods", "--device", "cpu", "--json", timeout=3 * PATIENCE)
    assert made.returncode == 0, made.stderr
    rows = json.loads(made.stdout)["runs"]
    measured = {
        row["settings"]["case"]: {stage: value for stage, value in row["perplexity"].items() if value}
        for row in rows
    }
    trained = {
        "rtn": [],
        "block-ap": ["block_ap"],
        "efficient-qat": ["block_ap", "e2e_qp"],
        "peqa": ["e2e_qp"],
        "lr-qat": ["lr_qat"],
        "full-qat": ["e2e_qat"],
    }
    assert {case: list(found) for case, found in measured.items()} == {
        case: ["fp", "rtn", *stages] for case, stages in trained.items()
    }
    # They begin with the same model, and no two of them end with the same.
    for stage in ("fp", "rtn"):
        assert len({found[stage] for found in measured.values()}) == 1
    assert len({list(found.values())[-1] for found in measured.values()}) == len(trained)
    assert all(row["size_bytes"]["quantized"] < row["size_bytes"]["fp"] for row in rows)
    shown = eqat("sweep", "show", "latest").stdout
    assert "6 of 6 done" in shown
    assert all(f" {case} " in shown for case in trained)


def test_the_list_tells_of_every_sweep_what_became_of_its_runs(eqat: Eqat, tmp_path: Path) -> None:
    nothing = eqat("sweep", "list")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert f"no sweeps in {tmp_path / 'runs'}" in nothing.stderr
    assert eqat("sweep", "list", "--json").stdout.strip() == "[]"
    ended(start_eqat(tmp_path, "2=finishes,3=fails", *TWO))
    newest = made_of_two(tmp_path)
    damaged = tmp_path / "runs" / "sweep-20200101-0000-broken-0000"
    damaged.mkdir()
    (damaged / "sweep.json").write_text("{")
    found = eqat("sweep", "list", "--json")
    assert found.returncode == 0
    assert "sweep-20200101-0000-broken-0000 is left out: " in found.stderr
    rows = json.loads(found.stdout)
    assert rows[0]["id"] == newest.id
    assert [(row["runs"], row["done"], row["states"], row["swept"], row["at_work"]) for row in rows] == [
        (2, 0, {"waiting": 2}, ["grid.bits"], False),
        (2, 1, {"done": 1, "failed": 1}, ["grid.bits"], False),
    ]
    table = eqat("sweep", "list").stdout.splitlines()
    assert table[0].split() == ["SWEEP", "DONE", "OTHERS", "SWEPT", "MADE"]
    assert table[1].startswith(newest.id)
    assert "0 of 2  2 waiting  grid.bits" in table[1]
    assert "1 of 2  1 failed   grid.bits" in table[2]


# -- what ends a sweep ---------------------------------------------------------------------------------


def test_a_failing_and_a_dying_run_do_not_stop_the_others(eqat: Eqat, tmp_path: Path) -> None:
    out, err = ended(process := start_eqat(tmp_path, "2=fails,3=dies,4=finishes", *THREE))
    assert process.returncode == 4, err
    assert outcomes(eqat) == ["failed", "crashed", "done"]
    assert "1: data.source: too little text (give more)" in out
    assert "eqat sweep resume sweep-" in err
    out, _ = ended(process := start_eqat(tmp_path, "finishes", "sweep", "resume", "latest"))
    assert (process.returncode, "3 of 3 done" in out) == (0, True)
    attempts = [load_state(run).attempt for run in list_runs(tmp_path / "runs")]
    assert sorted(attempts) == [1, 2, 2]


def test_the_table_says_of_a_run_that_its_disk_is_full(eqat: Eqat, tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "waits", *TWO)
    wait_until(lambda: "paused (disk full)" in eqat("sweep", "show", "latest").stdout)
    assert outcomes(eqat) == ["running", "waiting"]
    assert eqat("stop", "latest").returncode == 0
    ended(process)
    assert "paused" not in eqat("sweep", "show", "latest").stdout


def test_an_interrupt_stops_the_run_and_the_sweep(eqat: Eqat, tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "works", *TWO)
    run = at_work(tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = ended(process)
    assert (process.returncode, "Traceback" in err) == (75, False)
    assert (run_state(run), outcomes(eqat)) == ("stopped", ["stopped", "waiting"])
    process = start_eqat(tmp_path, "ignores stop", "sweep", "resume", "latest")
    assert at_work(tmp_path).id == run.id
    process.send_signal(signal.SIGINT)
    wait_until(lambda: len(load_state(run).acknowledged) == 2)
    process.send_signal(signal.SIGINT)
    ended(process)
    assert (process.returncode, outcomes(eqat)) == (130, ["aborted", "waiting"])


def test_stopping_the_run_at_work_from_elsewhere_stops_the_sweep(eqat: Eqat, tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "works", *TWO)
    at_work(tmp_path)
    assert eqat("stop", "latest").returncode == 0
    ended(process)
    assert (process.returncode, outcomes(eqat)) == (75, ["stopped", "waiting"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP])
def test_a_killed_sweep_leaves_its_run_at_work_and_is_gone_on_with(
    eqat: Eqat, tmp_path: Path, how: signal.Signals
) -> None:
    process = start_eqat(tmp_path, "2=fails,3=works,4=finishes", *THREE)
    run = at_work(tmp_path, count=2)
    process.send_signal(how)
    ended(process)
    assert process.returncode == -how
    assert (is_held(run.lock_path), outcomes(eqat)) == (True, ["failed", "running", "waiting"])
    # The one at work is followed before anything else is begun.
    process = start_eqat(tmp_path, "finishes", "sweep", "resume", "latest")
    follows(process)
    refused = eqat("sweep", "resume", "latest")
    assert refused.returncode == 3
    assert f"is being carried out by process {process.pid} already" in refused.stderr
    process.send_signal(signal.SIGTERM)
    ended(process)
    assert (process.returncode, outcomes(eqat)) == (75, ["failed", "stopped", "waiting"])
    assert len(list_runs(tmp_path / "runs")) == 2


def test_a_sweep_killed_while_it_made_a_run_knows_that_run(eqat: Eqat, tmp_path: Path) -> None:
    sweep = made_of_two(tmp_path)
    first = sweep.members[0]

    def announce(run_id: str) -> None:
        assert not (tmp_path / "runs" / run_id).exists()
        first.run = run_id
        sweep.write()

    run = RunDirectory.create(sweep.runs_dir, first.configuration(), announce=announce)
    # Of the second one the id was written down and nothing made.
    sweep.members[1].run = f"{run.id}0"
    sweep.write()
    assert outcomes(eqat) == ["created", "gone"]
    _, err = ended(process := start_eqat(tmp_path, "finishes", "sweep", "resume", "latest"))
    assert (process.returncode, outcomes(eqat)) == (0, ["done", "done"]), err
    ids = {member.run for member in the_sweep(tmp_path).members}
    assert {made.id for made in list_runs(tmp_path / "runs")} == ids
    assert run.id in ids


def test_a_run_that_was_deleted_is_made_anew(eqat: Eqat, tmp_path: Path) -> None:
    ended(start_eqat(tmp_path, "finishes", *TWO))
    first = the_sweep(tmp_path).members[0].run
    assert first is not None
    assert eqat("rm", first, "--yes").returncode == 0
    assert outcomes(eqat) == ["gone", "done"]
    ended(start_eqat(tmp_path, "finishes", "sweep", "resume", str(the_sweep(tmp_path).path)))
    assert outcomes(eqat) == ["done", "done"]
    assert the_sweep(tmp_path).members[0].run != first


def test_detached_it_outlives_whoever_began_it(eqat: Eqat, tmp_path: Path) -> None:
    one = ("sweep", "smoke", "--device", "cpu", "--sweep", "grid.bits=3")
    begun = eqat(*one, *SMALL, "--set", "evaluation.enabled=false", "--detach", "--json")
    made = json.loads(begun.stdout)
    assert begun.returncode == 0
    wait_until(lambda: outcomes(eqat) == ["done"])
    wait_until(lambda: holder(the_sweep(tmp_path).lock_path) is None)
    assert made["path"] == str(the_sweep(tmp_path).path)
    wait_until(lambda: "1 of 1 done" in (the_sweep(tmp_path).path / "sweep.log").read_text())


# -- the folder of a sweep -----------------------------------------------------------------------------


def test_a_sweep_lies_beside_its_runs_and_is_none(eqat: Eqat, tmp_path: Path) -> None:
    ended(start_eqat(tmp_path, "finishes", *TWO))
    sweep = the_sweep(tmp_path)
    assert sorted(path.name for path in sweep.path.iterdir()) == ["lock", "sweep.json"]
    assert {run.id for run in list_runs(tmp_path / "runs")} == {member.run for member in sweep.members}
    assert len(json.loads(eqat("runs", "--json").stdout)) == 2
    refused: subprocess.CompletedProcess[str] = eqat("rm", str(sweep.path), "--yes")
    assert (refused.returncode != 0, sweep.path.exists()) == (True, True)
    # All of it may be moved.
    os.rename(tmp_path / "runs", tmp_path / "elsewhere")
    moved = eqat("sweep", "show", f"elsewhere/{sweep.id}", "--json")
    assert [row["outcome"] for row in json.loads(moved.stdout)["runs"]] == ["done", "done"]


def test_a_forged_file_leads_nowhere_else(eqat: Eqat, tmp_path: Path) -> None:
    made = made_of_two(tmp_path)
    assert outcomes(eqat) == ["waiting", "waiting"]
    file = made.path / "sweep.json"
    tree = json.loads(file.read_text())
    for forged in ("../elsewhere", "..", "", "a\0b"):
        tree["members"][0]["run"] = forged
        file.write_text(json.dumps(tree))
        refused = eqat("sweep", "show", "latest")
        assert (refused.returncode, "Traceback" in refused.stderr) == (3, False), forged
        (line,) = refused.stderr.splitlines()
        assert "sweep.json" in line


# -- several at a time ---------------------------------------------------------------------------------

BOTH = ("--jobs", "2")
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")


@needs_two_cores
def test_two_at_a_time_each_have_cores_of_their_own_and_one_request_stops_both(
    eqat: Eqat, tmp_path: Path
) -> None:
    process = start_eqat(tmp_path, "works", *THREE, *BOTH)
    runs = runs_at_work(tmp_path, 2)
    cores = [os.sched_getaffinity(holder(run.lock_path) or 0) for run in runs]
    assert all(cores)
    assert not cores[0] & cores[1]
    process.send_signal(signal.SIGKILL)
    ended(process)
    # What is at work is followed, and nothing is begun beside it.
    process = start_eqat(tmp_path, "works", "sweep", "resume", "latest", *BOTH)
    wait_until(lambda: the_sweep(tmp_path).at_work)
    follows_many(process)
    assert outcomes(eqat) == ["running", "running", "waiting"]
    process.send_signal(signal.SIGINT)
    _, told = ended(process)
    assert (process.returncode, outcomes(eqat)) == (75, ["stopped", "stopped", "waiting"])
    assert "Traceback" not in told
    assert "[1/3] stopped" in told
    assert "[2/3] stopped" in told


@needs_two_cores
def test_of_two_at_a_time_one_that_fails_makes_room_for_the_next(eqat: Eqat, tmp_path: Path) -> None:
    process = start_eqat(tmp_path, "2=fails,3=finishes,4=finishes", *THREE, *BOTH)
    _, told = ended(process)
    assert (process.returncode, outcomes(eqat)) == (4, ["failed", "done", "done"]), told
    assert "[1/3] error: data.source: too little text (give more)" in told
    assert "[3/3] grid.bits=4: run " in told
    assert "[2/3]   perplexity, Block-AP: 23.67" in told


def follows_many(process: subprocess.Popen[str]) -> None:
    """Wait until it takes signals for the runs that it follows."""
    wait_until(lambda: handles(process.pid, signal.SIGUSR1) or process.poll() is not None)


def test_more_at_a_time_than_the_machine_has_are_refused(eqat: Eqat, tmp_path: Path) -> None:
    refused = eqat(*TWO, "--jobs", "4000")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: --jobs: 4000 runs at a time need a core each")
    assert not (tmp_path / "runs").exists()
    planned = eqat(*THREE, "--jobs", "1", "--dry-run", "--json")
    assert json.loads(planned.stdout)["jobs"] == 1
