"""The runs of a sweep one by one: making them, and what is known of them."""

from __future__ import annotations

import signal

from engine.errors import EqatError, ExitCode
from engine.plan.plan import check, make_plan
from engine.run.directory import RunDirectory
from engine.run.liveness import look
from engine.run.sweep import UNREADABLE, Failure, Member, Sweep
from engine.run.task import is_job

ENDS = (ExitCode.STOPPED, ExitCode.ABORTED, ExitCode.TERMINATED)
"""A run that ends so was meant to end, and with it the sweep."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask for a sweep to end."""


def is_at_work(run: RunDirectory | None) -> bool:
    """Whether an engine works on the run itself, and not on something beside it."""
    if run is None:
        return False
    try:
        work = look(run).work
    except EqatError:  # which is told in its turn
        return False
    return work is not None and not is_job(work.task)


def state_of(run: RunDirectory) -> str:
    """The state of a run; none that there is where its log cannot be read, which its turn tells."""
    try:
        return look(run).state
    except EqatError:
        return UNREADABLE


def made(sweep: Sweep, member: Member) -> RunDirectory:
    """A new run, planned and made as ``eqat run`` does; its id is written down before."""
    config = member.configuration()
    check(make_plan(config, runs_dir=sweep.runs_dir))

    def announce(run_id: str) -> None:
        member.run = run_id
        sweep.write()

    return RunDirectory.create(sweep.runs_dir, config, announce=announce)


def note(sweep: Sweep, member: Member, error: EqatError | None) -> None:
    """Write down what prevents a run, or that nothing does."""
    found = None
    if error is not None:
        code = int(error.exit_code)
        found = Failure(message=error.message, where=error.where, hint=error.hint, exit_code=code)
    if found != member.error:
        member.error = found
        sweep.write()
