"""Whole runs by a real Slurm of two nodes: warned, put aside, cut off, cancelled. Minutes: ``make slurm``."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, Eqat
from waiting import wait_until

from engine.run import slurm
from engine.run.directory import RunDirectory
from engine.run.event_log import read_events
from engine.run.events import AnyEvent, BlockStarted, RunFinished, RunStarted
from engine.run.finding import list_runs
from engine.run.liveness import look, run_state
from engine.run.shown import summarize
from engine.run.status import read_status
from engine.run.stopping import end_job, job_at_work
from eqat_tui.run_text import state_words

REPOSITORY = Path(__file__).parents[3]
SLOW = "block_ap.epochs=24"
"""A block takes a few seconds, so that there is time for something to happen in it."""
SLOWER = "block_ap.epochs=160"
"""The run takes longer than Slurm's shortest time."""
SMALL = (
    *("smoke", "--device", "cpu", "--set", "runtime.threads=1", "--set", "evaluation.windows=4"),
    *("--set", "block_ap.sequences=4", "--set", "block_ap.val_sequences=2", "--set", "block_ap.batch_size=2"),
)
WEIGHTS = "export/gptq_v2/model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def nodes(cluster: Cluster) -> Iterator[Cluster]:
    """Both nodes at work, and this process one that may ask their Slurm."""
    before = {name: os.environ.get(name) for name in cluster.environment}
    os.environ.update(cluster.environment)
    for node in ("n1", "n2"):
        cluster.start_node(node)
    yield cluster
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def made_here(folder: Path, setting: str) -> bytes:
    """What a run exports that nothing happens to."""
    command = [sys.executable, "-m", "eqat_tui", "run", *SMALL, "--set", setting, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return (Path(json.loads(done.stdout)["path"]) / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return made_here(tmp_path_factory.mktemp("undisturbed"), SLOW)


def submitted(eqat: Eqat, folder: Path, *more: str, setting: str = SLOW) -> tuple[RunDirectory, str]:
    """A slow run that Slurm was given, and its job."""
    told = json.loads(eqat("run", *SMALL, "--set", setting, "--on", "slurm", "--json", *more).stdout)
    (run,) = list_runs(folder / "runs")
    return run, told["job"]


def of(run: RunDirectory, kind: type[AnyEvent]) -> list[Any]:
    return [event for event in read_events(run.events_path)[0] if isinstance(event, kind)]


def trains(run: RunDirectory, attempt: int = 1, block: int = 1) -> Callable[[], bool]:
    """Whether an attempt has begun with a block."""
    return lambda: any(one.attempt == attempt and one.block == block for one in of(run, BlockStarted))


def attached(folder: Path, run: RunDirectory) -> subprocess.Popen[str]:
    """``eqat attach``, in lines."""
    return subprocess.Popen(
        [sys.executable, "-m", "eqat_tui", "attach", str(run.path), "--plain"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_run_that_is_warned_of_its_end_goes_on_in_the_same_job_to_the_same_bytes(
    eqat: Eqat, cluster: Cluster, tmp_path: Path
) -> None:
    # A minute is Slurm's shortest time; its warning comes on its own, some time before.
    run, job = submitted(eqat, tmp_path, "--time", "1", "--sbatch=--signal=B:USR1@40", setting=SLOWER)
    wait_until(lambda: look(run).work is not None and run.status_path.exists())
    follower = attached(tmp_path, run)
    wait_until(lambda: of(run, RunFinished))
    assert [(one.outcome, one.exit_code) for one in of(run, RunFinished)] == [("stopped", 75)]
    assert run_state(run) == "waiting"
    assert f"waiting in Slurm as job {job}" in eqat("runs").stdout
    wait_until(lambda: run_state(run) in ("starting", "running"))
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    told, _ = follower.communicate(timeout=300)
    assert follower.returncode == 0, told
    assert f"waiting in Slurm as job {job}" in told
    assert len(of(run, RunStarted)) >= 2
    (tmp_path / "here").mkdir()
    assert (run.path / WEIGHTS).read_bytes() == made_here(tmp_path / "here", SLOWER)
    assert "the job goes back into the queue" in (run.logs_dir / f"slurm-{job}.log").read_text()


def test_a_run_that_is_put_aside_for_another_goes_on_to_the_same_bytes(
    eqat: Eqat, cluster: Cluster, tmp_path: Path, undisturbed: bytes
) -> None:
    run, job = submitted(eqat, tmp_path, "--cpus", "2")
    wait_until(trains(run))
    cluster.command("sbatch", "--partition=high", "-N2", "-c2", "--output=/dev/null", "--wrap", "sleep 3")
    wait_until(lambda: of(run, RunFinished))
    assert [one.outcome for one in of(run, RunFinished)] == ["stopped"]  # by Slurm's SIGTERM
    wait_until(lambda: cluster.job_state(job) == "PENDING")
    slurm.forget()
    assert run_state(run) == "waiting"
    wait_until(lambda: run_state(run) == "done")
    assert (run.path / WEIGHTS).read_bytes() == undisturbed


def test_a_run_whose_node_fails_goes_on_at_another_to_the_same_bytes(
    eqat: Eqat, cluster: Cluster, tmp_path: Path, undisturbed: bytes
) -> None:
    run, job = submitted(eqat, tmp_path, "--sbatch=--nodelist=n1")
    wait_until(trains(run))
    assert "on n1" in eqat("runs").stdout
    cluster.command("scontrol", "update", f"JobId={job}", "ReqNodeList=n1,n2", check=False)
    cluster.fail_node("n1")
    wait_until(lambda: cluster.job_state(job) in ("PENDING", "RUNNING") and "n1" not in where(cluster, job))
    cluster.command("scontrol", "update", f"JobId={job}", "ReqNodeList=", check=False)
    wait_until(lambda: run_state(run) == "done")
    assert [one.outcome for one in of(run, RunFinished)] == ["done"]
    status = read_status(run)
    assert status is not None
    assert (status.host, status.job) == ("n2", job)
    assert (run.path / WEIGHTS).read_bytes() == undisturbed
    cluster.start_node("n1")


def where(cluster: Cluster, job: str) -> str:
    return cluster.command("squeue", "-h", "--states=all", "-j", job, "-o", "%N", check=False)


def test_a_run_that_is_stopped_is_not_put_back_and_goes_on_when_asked(
    eqat: Eqat, cluster: Cluster, tmp_path: Path, undisturbed: bytes
) -> None:
    run, job = submitted(eqat, tmp_path)
    wait_until(trains(run))
    eqat("stop", "latest", "--wait")
    assert run_state(run) == "stopped"
    wait_until(lambda: cluster.job_state(job) not in ("RUNNING", "COMPLETING"))
    assert cluster.job_state(job) == "FAILED"  # exit code 75
    assert run_state(run) == "stopped"
    again = json.loads(eqat("resume", "latest", "--on", "slurm", "--json").stdout)["job"]
    wait_until(lambda: len(of(run, RunStarted)) == 2)
    wait_until(trains(run, attempt=2, block=2))
    cluster.command("scancel", again)  # which is a stop as well
    wait_until(lambda: run_state(run) == "stopped")
    eqat("resume", "latest", "--on", "slurm")
    wait_until(lambda: run_state(run) == "done")
    assert (run.path / WEIGHTS).read_bytes() == undisturbed


def test_an_engine_that_does_not_answer_is_ended_from_another_machine_and_not_begun_again(
    eqat: Eqat, cluster: Cluster, tmp_path: Path
) -> None:
    run, job = submitted(eqat, tmp_path)
    wait_until(trains(run))
    status = read_status(run)
    assert status is not None
    os.kill(status.pid, signal.SIGSTOP)  # Slurm wakes it by SIGCONT, and it can still checkpoint
    # What `eqat stop --kill` does where the engine is no process of this machine.
    found = job_at_work(run)
    assert found is not None
    end_job(run, found)
    assert run_state(run) == "stopped"
    time.sleep(3.0)
    assert cluster.job_state(job) == "CANCELLED"
    assert run_state(run) == "stopped"


def test_the_script_on_the_page_stops_with_a_checkpoint_when_it_is_warned(
    cluster: Cluster, tmp_path: Path
) -> None:
    page = (REPOSITORY / "docs" / "clusters.md").read_text()
    script = page.partition("```bash\n")[2].partition("```")[0]
    started = shlex.join([sys.executable, "-m", "eqat_tui", "run", *SMALL, "--set", SLOW])
    ours, found = re.subn(r"eqat run .* --runs-dir .*", f"{started} --runs-dir {tmp_path}/runs", script)
    assert found == 1
    (tmp_path / "job.sh").write_text(ours.replace("#SBATCH --gres=gpu:1\n", ""))
    output = f"--output={tmp_path}/out.log"
    environment = f"--export=ALL,PYTHONPATH={REPOSITORY}"
    job = cluster.command("sbatch", "--parsable", output, environment, str(tmp_path / "job.sh")).strip()
    wait_until(lambda: list_runs(tmp_path / "runs"))
    (run,) = list_runs(tmp_path / "runs")
    wait_until(trains(run))
    assert "on n" in state_words(summarize(run))
    cluster.command("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: cluster.job_state(job) == "FAILED")
    assert "ExitCode=75:0" in cluster.command("scontrol", "show", "job", job)
    assert run_state(run) == "stopped"


def test_of_an_array_of_four_runs_one_fails_and_the_others_are_done(
    eqat: Eqat, cluster: Cluster, tmp_path: Path, undisturbed: bytes
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One sentence of the text after another is written here. " * 4000)
    cluster.command("scontrol", "update", "PartitionName=low", "State=DOWN")
    done = eqat(
        *("sweep", *SMALL, "--set", SLOW, "--on", "slurm", "--json"),
        *("--sweep", f"data.source=builtin,{text}", "--sweep", "grid.bits=3,4"),
    )
    rows = json.loads(done.stdout)["runs"]
    assert [row["outcome"] for row in rows] == ["waiting"] * 4
    text.rename(tmp_path / "gone.txt")
    cluster.command("scontrol", "update", "PartitionName=low", "State=UP")

    def outcomes() -> list[str]:
        return [
            row["outcome"] for row in json.loads(eqat("sweep", "show", "latest", "--json").stdout)["runs"]
        ]

    second = RunDirectory.open(tmp_path / "runs" / rows[1]["id"])
    wait_until(trains(second))
    cluster.command(
        "scancel", "--signal=USR1", "--batch", rows[1]["batch"]["job"]
    )  # as before its time is over
    wait_until(lambda: not {"waiting", "starting", "running"} & set(outcomes()))
    assert outcomes() == ["done", "done", "failed", "failed"]
    assert [one.outcome for one in of(second, RunFinished)] == ["stopped", "done"]
    assert (second.path / WEIGHTS).read_bytes() == undisturbed  # which is of 4 bits, too
    (tmp_path / "gone.txt").rename(text)
    eqat("sweep", "resume", "latest", "--on", "slurm")
    wait_until(lambda: outcomes() == ["done"] * 4)
