"""What is asked of Slurm, through its own commands: to take a job, where it is, to end it, to put it back.

A scheduler is shared by everybody who uses the cluster. It is asked for all jobs of a user at once, and no
more often than every few seconds, however many runs are looked at."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from engine.errors import EqatError, PreflightError, UsageError, first_line
from engine.run.submitted import Submitted
from engine.system.printable import printable
from engine.system.this_machine import JOB

ASK_EVERY_S = 5.0
"""What Slurm said is believed for so long."""
PATIENCE_S = 10.0
"""A scheduler that does not answer within this time is not waited for."""
SUBMIT_PATIENCE_S = 120.0
"""The same where there is no going on without an answer."""
LONGEST = 300

Kind = Literal["waiting", "working", "over"]
WAITING = frozenset(
    ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED")
)
"""States of a job that is to run, or to go on."""
WORKING = frozenset(("RUNNING", "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"))
"""States of a job whose processes are, or may be, alive."""


class Job(NamedTuple):
    """A job as Slurm sees it."""

    id: str
    state: str
    """In Slurm's words: ``PENDING``, ``RUNNING``, ..."""
    reason: str
    """Why it waits."""
    node: str
    """Where it is, or was."""
    name: str

    @property
    def kind(self) -> Kind:
        """What that means for a run."""
        return "waiting" if self.state in WAITING else "working" if self.state in WORKING else "over"


class _Answer(NamedTuple):
    asked: float
    """Wall clock time."""
    jobs: Mapping[str, Job] | None
    """None where Slurm could not be asked."""


_answers: dict[int, _Answer] = {}
_asking = threading.Lock()


def known(submitted: Submitted, owner: int) -> tuple[bool, Job | None]:
    """Whether Slurm could be asked, and the job, unless it does not know it (any more). ``owner`` is the user
    id of whoever submitted it."""
    if submitted.cluster and submitted.cluster != cluster():
        return False, None
    with _asking:
        answer = _answers.get(owner)
        now = time.time()
        fresh = answer is not None and 0 <= now - answer.asked < ASK_EVERY_S and answer.asked > submitted.t
        if answer is None or not fresh:
            answer = _answers[owner] = _Answer(now, _jobs_of(owner))
    if answer.jobs is None:
        return False, None
    job = answer.jobs.get(submitted.job)
    return True, job if job is not None and job.name == submitted.name else None


@functools.cache
def cluster() -> str:
    """What the cluster is called that this machine belongs to; empty where that cannot be asked."""
    try:
        told = _command("scontrol", "show", "config", patience=PATIENCE_S)
    except EqatError:
        return ""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", told, re.MULTILINE)
    return printable(found[1])[:LONGEST] if found else ""


def forget() -> None:
    """What Slurm said before is not to be believed any more."""
    with _asking:
        _answers.clear()


def _jobs_of(user: int) -> Mapping[str, Job] | None:
    """Every job of a user that Slurm still knows, each task of an array by itself."""
    words = ("--noheader", "--array", "--states=all", f"--user={user}", "--format=%i|%T|%r|%N|%j")
    try:
        done = _command("squeue", *words, patience=PATIENCE_S)
    except EqatError:
        return None
    found = {}
    for row in done.splitlines():
        parts = row.split("|", 4)
        if len(parts) == 5 and JOB.fullmatch(parts[0].strip()):
            job = Job(*(printable(part.strip())[:LONGEST] for part in parts))
            found[job.id] = job
    return found


def submit(script: str, options: Sequence[str], environment: Mapping[str, str]) -> str:
    """Give Slurm a script, to be run in ``environment``; the number of the job.

    Raises:
        PreflightError: where there is no Slurm here.
        UsageError: for what Slurm refuses, in its words.
    """
    said = _command(
        "sbatch", "--parsable", *options, told=script, patience=SUBMIT_PATIENCE_S, inside=environment
    )
    job = said.strip().partition(";")[0]
    if not JOB.fullmatch(job):
        raise PreflightError(f"answered {printable(said)[:LONGEST]!r} and no job's number", where="sbatch")
    forget()
    return job


def cancel(submitted: Submitted) -> None:
    """Take a job out of Slurm. One that has begun hears SIGTERM, by which its engine stops with a checkpoint;
    what is left of it after Slurm's KillWait (half a minute by default) is killed. It is not begun again.

    Raises:
        PreflightError: where Slurm cannot be asked.
        UsageError: where it does not know the job.
    """
    # Of another cluster's job with this number nothing may be ended. scancel could ask for the name itself,
    # but then it takes all tasks of an array that wait for the one that is meant.
    require_slurm("scancel")
    forget()
    could_ask, job = known(submitted, os.getuid())
    if not could_ask:
        raise PreflightError(
            f"job {submitted.job} cannot be asked for",
            where="squeue",
            hint=f"try it on a machine of the cluster {submitted.cluster}".rstrip(),
        )
    if job is None or job.kind == "over":
        raise UsageError(
            f"job {submitted.job} is over, or none of yours",
            where="Slurm",
            hint="eqat runs shows what is left",
        )
    _command("scancel", submitted.job, patience=SUBMIT_PATIENCE_S)
    forget()


def put_back(job: str) -> None:
    """Have a job that runs begin once more, when there is room for it; what it has started is ended."""
    _command("scontrol", "requeue", job, patience=SUBMIT_PATIENCE_S)


def require_slurm(program: str = "sbatch") -> None:
    """PreflightError where Slurm's commands are not installed."""
    if shutil.which(program) is None:
        gone = "; if that cluster is gone for good, delete submitted.json in the run's folder"
        raise PreflightError(
            "there is no Slurm on this machine",
            where=program,
            hint="log in where its commands are" + (gone if program == "scancel" else ""),
        )


def _command(
    program: str, *words: str, told: str = "", patience: float, inside: Mapping[str, str] | None = None
) -> str:
    """What one of Slurm's commands prints."""
    require_slurm(program)
    # A format that the user has chosen for their own eyes is not ours.
    environment = inside if inside is not None else os.environ
    kept = {name: value for name, value in environment.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(
            [program, *words],
            input=told,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience,
            env=kept,
            start_new_session=True,  # a Ctrl-C of the terminal is ours to hear
        )
    except subprocess.TimeoutExpired as error:
        raise PreflightError(f"did not answer within {patience:.0f} s", where=program) from error
    except OSError as error:
        raise PreflightError(f"cannot be started: {error.strerror}", where=program) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it did not say why"]
        said = first_line(ValueError(lines[-1])).removeprefix(f"{program}: ").removeprefix("error: ")
        raise UsageError(printable(said), where=program, hint="Slurm has refused it")
    return done.stdout
