"""What a job of Slurm's does: it starts an engine on its run, and follows it to its end.

    python -m eqat_tui.clusters.job RUN|SWEEP [arguments of the engine]

Slurm warns the job before its time is over, and before it is put aside for another where the cluster warns
then. The engine is asked to stop; it writes a checkpoint at its next step, and the job puts itself back into
the queue, to go on exactly there. Asked through ``control/`` and not by a signal: Slurm's own SIGTERM reaches
the engine too, and two of them mean abort. Of a sweep, each task of the array has the run of its number.

What ends otherwise is not put back: a run that is done or has failed, one that somebody has stopped (``eqat
stop``, ``scancel``). A job that loses its node, or is put aside, is put back by Slurm itself (``--requeue``).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.config.tables import load_extensions
from engine.errors import EqatError, ExitCode, UsageError
from engine.run import slurm
from engine.run.directory import RunDirectory
from engine.run.launch import launch
from engine.run.liveness import run_state
from engine.run.submitted import Submitted, write_submitted
from engine.run.sweep import Sweep, is_sweep
from engine.system import this_machine
from engine.system.standard_streams import open_standard_streams
from eqat_tui.clusters.submitting import job_name
from eqat_tui.display import PlainDisplay
from eqat_tui.follow import Follower
from eqat_tui.output import error_words, one_line, say

PROGRESS_S = 60.0
"""The job's log gets a line of progress at most this often."""


class _Warned(Follower):
    """Follows a run, and knows whether Slurm has warned of the job's end."""

    def __init__(self, run: RunDirectory, job: Submitted) -> None:
        super().__init__(run, PlainDisplay(PROGRESS_S))
        self.job = job

    def _stop(self) -> None:
        # Written before the engine can have stopped: nobody is to take the run for one that stays so.
        if self.was_warned and not self.job.returns:
            self.job = msgspec.structs.replace(self.job, t=time.time(), returns=True)
            write_submitted(self.run, self.job)
        super()._stop()


def main(arguments: Sequence[str]) -> int:
    """Returns the job's exit code, which is the engine's."""
    open_standard_streams()
    os.umask(os.umask(0o022) | 0o022)
    try:
        load_extensions()
        run, name = _run_of(Path(arguments[0]))
        return _make(run, name, arguments[1:])
    except EqatError as error:
        say(f"error: {one_line(error_words(error))}")
        return int(error.exit_code)


def _run_of(place: Path) -> tuple[RunDirectory, str]:
    """The job's run, and what the job is called."""
    if not is_sweep(place):
        run = RunDirectory.open(place)
        return run, job_name(run.path.name)
    sweep = Sweep.open(place)
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not task.isdecimal() or not 1 <= int(task) <= len(sweep.members):
        raise UsageError("is a sweep, and this is no task of an array that has a run of it", where=sweep.id)
    found = sweep.run_of(sweep.members[int(task) - 1])
    if found is None:
        raise UsageError(f"run {task} is not there any more", where=sweep.id)
    return found, job_name(sweep.id)


def _make(run: RunDirectory, name: str, args: Sequence[str]) -> int:
    number = this_machine.batch_job()
    if not number:
        raise UsageError(
            "is started by Slurm", where="eqat_tui.clusters.job", hint="eqat run FILE --on slurm"
        )
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    job = Submitted(job=number, name=name, cluster=cluster, t=time.time())
    write_submitted(run, job)
    if run_state(run) == "done":  # it was put back too late to be of use
        return ExitCode.DONE
    say(f"run {run.id}, job {number} on {this_machine.node()}")
    follower = _Warned(run, job)
    follower.catch_up()
    code = follower.follow(start=lambda: launch(run, args=args))
    if code == ExitCode.STOPPED and follower.job.returns:
        _put_back(run, follower.job)
    elif follower.job.returns:
        write_submitted(run, msgspec.structs.replace(follower.job, returns=False))
    return code


def _put_back(run: RunDirectory, job: Submitted) -> None:
    say("stopped with a checkpoint; the job goes back into the queue")
    try:
        slurm.put_back(os.environ.get("SLURM_JOB_ID", job.job))
    except EqatError:
        write_submitted(run, msgspec.structs.replace(job, returns=False))
        raise
    # Slurm ends what is left of the job now.


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
