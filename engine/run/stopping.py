"""Asking whoever works on a run, or is going to, to end: an engine by a file, a job that waits by its
cluster."""

from __future__ import annotations

import time

from engine.errors import PreflightError
from engine.run import slurm
from engine.run.control import Action, request
from engine.run.directory import RunDirectory
from engine.run.liveness import look
from engine.run.status import read_status
from engine.run.submitted import Submitted, read_submitted

KILL_SECONDS = 180.0
"""How long a job may take to be gone: Slurm lets it end by itself first."""


def ask_to_end(run: RunDirectory, action: Action) -> str:
    """Ask an engine to stop or to abort, by a file that it finds wherever it runs; a job that only waits is
    taken out of Slurm, and its number is returned.

    Raises:
        EqatError: where that cannot be asked for.
    """
    work = look(run).work
    submitted = read_submitted(run) if work is not None and work.state == "waiting" else None
    if submitted is None:
        request(run, action)
        return ""
    run.require_own()
    slurm.cancel(submitted)  # one that has begun meanwhile hears SIGTERM, and stops with a checkpoint
    return submitted.job


def job_at_work(run: RunDirectory) -> Submitted | None:
    """The job of Slurm's whose engine works on the run; none where it is not one's."""
    submitted, status = read_submitted(run), read_status(run)
    if submitted is None or status is None or status.outcome is not None:
        return None
    return submitted if status.job == submitted.job else None


def end_job(run: RunDirectory, submitted: Submitted) -> None:
    """End a job with everything in it, and return when nobody works on the run any more.

    Raises:
        PreflightError: where there is no Slurm here, or the job does not go.
    """
    run.require_own()
    slurm.cancel(submitted)
    deadline = time.monotonic() + KILL_SECONDS
    while _is_there(run, submitted):
        if time.monotonic() > deadline:
            raise PreflightError(
                f"Slurm's job {submitted.job} was cancelled and is not gone yet",
                where=run.id,
                hint=f"squeue --job={submitted.job} says why",
            )
        time.sleep(1.0)
        slurm.forget()


def _is_there(run: RunDirectory, submitted: Submitted) -> bool:
    could_ask, job = slurm.known(submitted, run.path.stat().st_uid)
    return not could_ask or (job is not None and job.kind != "over")
