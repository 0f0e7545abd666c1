"""What waits in a real Slurm, whose nodes are down: nothing here starts an engine."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from slurm_cluster import Cluster, Eqat

from engine.config.loading import load
from engine.errors import PreflightError, UsageError
from engine.run import slurm
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.events import AttemptStarting
from engine.run.finding import list_runs
from engine.run.launch import refuse_second
from engine.run.liveness import look
from engine.run.status import Status, write_status
from engine.run.submitted import Submitted, read_submitted, write_submitted

SMOKE = ("smoke", "--device", "cpu", "--on", "slurm")


def only_run(folder: Path) -> RunDirectory:
    (run,) = list_runs(folder / "runs")
    return run


def test_a_run_that_waits_is_shown_as_such_and_is_nobody_elses(
    eqat: Eqat, cluster: Cluster, tmp_path: Path
) -> None:
    done = eqat("run", *SMOKE, "--time", "1:00:00", "--cpus", "1", "--memory", "1G", "--json")
    told = json.loads(done.stdout)
    run = only_run(tmp_path)
    assert told == {"id": run.id, "path": str(run.path), "job": told["job"]}
    job = told["job"]
    asked = cluster.command("squeue", "-h", "-o", "%l %m %C %j", "-j", job).split()
    assert asked == ["1:00:00", "1G", "1", f"eqat-{run.id}"]
    waits = f"waiting in Slurm as job {job}"
    assert waits in eqat("runs").stdout
    assert waits in eqat("show", "latest").stdout
    (row,) = json.loads(eqat("runs", "--json").stdout)
    assert (row["state"], row["batch"]["job"], row["batch"]["state"]) == ("waiting", job, "PENDING")
    assert "is waiting" in eqat("resume", "latest", code=3).stderr
    assert f"job {job} waits to work on it" in eqat("rm", "latest", "--yes", code=3).stderr
    assert run.config_toml.exists()

    assert f"took job {job}" in eqat("stop", "latest").stderr
    cluster.wait(lambda: cluster.job_state(job) == "CANCELLED", "the job was not cancelled")
    assert json.loads(eqat("runs", "--json").stdout)[0]["state"] == "created"

    # The device of this time decides what the job is given: a GPU, which this cluster does not have.
    on_a_gpu = eqat("resume", "latest", "--on", "slurm", "--set", "runtime.device=cuda", code=2)
    assert "gres" in on_a_gpu.stderr
    again = json.loads(eqat("resume", "latest", "--on", "slurm", "--json").stdout)
    assert again["id"] == run.id
    assert again["job"] != job
    assert f"waiting in Slurm as job {again['job']}" in eqat("runs").stdout
    eqat("stop", "latest")
    (run.logs_dir / f"slurm-{job}.log").write_text("what the job has told is the run's own\n")
    eqat("rm", "latest", "--yes")
    assert list_runs(tmp_path / "runs") == []


def test_a_sweep_is_one_array_and_is_submitted_once(eqat: Eqat, cluster: Cluster, tmp_path: Path) -> None:
    done = eqat("sweep", *SMOKE, "--sweep", "grid.bits=2,3,4", "--jobs", "2", "--json")
    rows = json.loads(done.stdout)["runs"]
    jobs = [row["batch"]["job"] for row in rows]
    array = jobs[0].partition("_")[0]
    assert jobs == [f"{array}_{task}" for task in (1, 2, 3)]
    assert [row["outcome"] for row in rows] == ["waiting"] * 3
    assert "ArrayTaskThrottle=2" in cluster.command("scontrol", "show", "job", array)
    shown = eqat("sweep", "show", "latest").stdout
    assert all(f"waiting in Slurm as job {job}" in shown for job in jobs)

    again = json.loads(eqat("sweep", "resume", "latest", "--on", "slurm", "--json").stdout)
    assert [row["batch"]["job"] for row in again["runs"]] == jobs

    eqat("stop", rows[1]["id"])
    cluster.wait(lambda: cluster.job_state(jobs[1]) in ("CANCELLED", ""), "the task was not cancelled")
    assert [cluster.job_state(jobs[number]) for number in (0, 2)] == ["PENDING"] * 2
    third = json.loads(eqat("sweep", "resume", "latest", "--on", "slurm", "--json").stdout)
    found = [row["batch"]["job"] for row in third["runs"]]
    assert (found[0], found[2]) == (jobs[0], jobs[2])
    assert found[1].endswith("_2")
    assert found[1] != jobs[1]


def test_what_slurm_refuses_is_one_line_and_leaves_no_run(eqat: Eqat, tmp_path: Path) -> None:
    done = eqat("run", *SMOKE, "--partition", "nowhere", code=2)
    assert "Invalid partition" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list_runs(tmp_path / "runs") == []


def test_a_job_of_another_cluster_with_the_same_number_is_neither_taken_for_ours_nor_ended(
    eqat: Eqat, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eqat("run", *SMOKE)
    run = only_run(tmp_path)
    mine = read_submitted(run)
    assert mine is not None
    write_submitted(run, Submitted(job=mine.job, name="eqat-of-another", t=time.time()))
    assert json.loads(eqat("runs", "--json").stdout)[0]["state"] == "created"
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="none of yours"):
        slurm.cancel(Submitted(job=mine.job, name="eqat-of-another", t=0.0))
    assert cluster.job_state(mine.job) == "PENDING"
    slurm.cancel(mine)
    cluster.wait(lambda: cluster.job_state(mine.job) == "CANCELLED", "the job was not cancelled")


def test_an_engine_elsewhere_is_known_to_be_gone_as_soon_as_its_job_is_over(
    eqat: Eqat, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eqat("run", *SMOKE)
    run = only_run(tmp_path)
    mine = read_submitted(run)
    assert mine is not None
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    slurm.forget()
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(AttemptStarting(pid=42, host="n7"))
    away = Status(attempt=1, heartbeat=time.time(), pid=42, host="n7", machine="another", job=mine.job)
    assert write_status(run, away)
    assert look(run).state == "running"
    slurm.cancel(mine)
    cluster.wait(lambda: cluster.job_state(mine.job) == "CANCELLED", "the job was not cancelled")
    slurm.forget()
    assert look(run).state == "crashed"


def test_the_scheduler_is_asked_once_for_many_runs(
    eqat: Eqat, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads(eqat("sweep", *SMOKE, "--sweep", "grid.bits=2,3,4", "--json").stdout)["runs"]
    asked = tmp_path / "asked"
    spy = tmp_path / "spy"
    spy.mkdir()
    (spy / "squeue").write_text(f'#!/bin/sh\necho >> {asked}\nPATH="${{PATH#*:}}" exec squeue "$@"\n')
    (spy / "squeue").chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", f"{spy}:{cluster.environment['PATH']}")
    slurm.forget()
    time.sleep(0.1)
    for row in rows * 3:
        assert look(RunDirectory.open(tmp_path / "runs" / row["id"])).state == "waiting"
    assert len(asked.read_text()) == 1
    slurm.forget()


def test_what_another_cluster_was_given_is_not_looked_for_in_this_one(
    eqat: Eqat, cluster: Cluster, tmp_path: Path
) -> None:
    eqat("run", *SMOKE)
    run = only_run(tmp_path)
    mine = read_submitted(run)
    assert mine is not None
    assert mine.cluster == "eqat"
    write_submitted(run, Submitted(job="4711", name=mine.name, cluster="far-away", t=time.time()))
    assert "waiting in Slurm as job 4711 (which cannot be asked from here)" in eqat("runs").stdout
    assert "the cluster far-away" in eqat("stop", "latest", code=3).stderr


@pytest.mark.usefixtures("no_slurm")
def test_where_slurm_cannot_be_asked_what_was_written_down_is_believed(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", load("smoke"))
    write_submitted(run, Submitted(job="7_2", name=f"eqat-{run.id}", t=time.time()))
    assert look(run).state == "waiting"
    with pytest.raises(PreflightError, match="job 7_2 waits to work on it"):
        refuse_second(run)
    with pytest.raises(PreflightError, match=r"no Slurm on this machine .*delete submitted.json"):
        slurm.cancel(Submitted(job="7_2", name="eqat-x", t=0.0))
