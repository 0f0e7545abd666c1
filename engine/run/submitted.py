"""``submitted.json``: the job of a cluster's that was asked to make the run.

It is written by whoever submits the job, and again by the job whenever it begins or is about to be put back
into the queue. What becomes of the job only the cluster knows (:mod:`engine.run.slurm`); what becomes of the
run its own files say."""

from __future__ import annotations

from typing import Annotated

import msgspec

from engine.run.directory import RunDirectory
from engine.system.files import atomic_write_json
from engine.system.guarded import BadFile, read_struct

JobId = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,10}(_[0-9]{1,10})?\Z")]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*\Z", max_length=300)]


class Submitted(msgspec.Struct, frozen=True, kw_only=True):
    """The job that a run was last given to. Jobs are numbered anew by every cluster, so its name belongs to
    it."""

    job: JobId
    """Slurm's number; of an array, the task's behind it."""
    name: Name
    """What the job is called: of two with one number, the run's own is told by it."""
    cluster: str = ""
    """What the cluster is called; empty where that was not known."""
    t: float
    """Seconds since 1970: when it was submitted, has begun, or was about to be put back."""
    returns: bool = False
    """It was warned of its end, and goes back into the queue once its engine has stopped."""


def read_submitted(run: RunDirectory) -> Submitted | None:
    """The job that the run was last given to, or none."""
    try:
        return read_struct(run.submitted_path, Submitted)
    except BadFile:
        return None


def write_submitted(run: RunDirectory, submitted: Submitted) -> None:
    """Write down the job that makes the run from now on."""
    atomic_write_json(run.submitted_path, submitted, root=run.path)
