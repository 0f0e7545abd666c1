"""The runs of a sweep one by one: making them, and what is known of them."""

from __future__ import annotations

import signal

from engine.errors import EqatError, ExitCode
from engine.plan.plan import check, make_plan
from engine.run.directory import RunDirectory
from engine.run.members import failure_of
from engine.run.sweep import Member, Sweep

ENDS = (ExitCode.STOPPED, ExitCode.ABORTED, ExitCode.TERMINATED)
"""A run that ends so was meant to end, and with it the sweep."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask for a sweep to end."""


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
    found = failure_of(error) if error is not None else None
    if found != member.error:
        member.error = found
        sweep.write()
