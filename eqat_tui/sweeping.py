"""Making the runs of a sweep one after the other, each followed as ``eqat run`` follows it, or several at a
time (:mod:`eqat_tui.sweeping_together`).

The engine of each run is a process of its own, which outlives this one; a sweep that was killed finds its run
at work or where that has ended, and goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from engine.config.loading import load_sweep
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.sweeps import (
    Combination,
    axes_of,
    combinations,
    settings_words,
    typed_axis,
    written_axes,
)
from engine.errors import EqatError, ExitCode, StopRequested
from engine.plan.machine import visible_gpus
from engine.plan.several import SeveralPlans, plan_several
from engine.run.directory import RunDirectory
from engine.run.finding import check_runs_dir, shorten, typed_path
from engine.run.launch import launch, log_path
from engine.run.members import is_at_work, state_of
from engine.run.shares import ALL, Share, shares
from engine.run.sweep import LOG, Member, Sweep, list_sweeps, show_sweep, summarize_sweep
from engine.system.files import existing, is_virtual
from eqat_tui.configure import on_users_device
from eqat_tui.detached import start_detached
from eqat_tui.display import open_display
from eqat_tui.follow import Follower, Left
from eqat_tui.hearing import hearing
from eqat_tui.output import cell, counted, error_words, one_line, print_json, say, show
from eqat_tui.sweep_members import ENDS, STOPS, made, note
from eqat_tui.sweep_text import plan_text, sweep_text, totals_words
from eqat_tui.sweeping_together import Together


def summaries(runs_dir: Path) -> list[dict[str, Any]]:
    """A row for each sweep; one that cannot be read is named on stderr and hides no other."""
    rows = []
    for path in list_sweeps(runs_dir):
        try:
            rows.append(summarize_sweep(Sweep.open(path)))
        except EqatError as error:
            say(f"{cell(path.name)} is left out: {one_line(error_words(error))}")
    return rows


def combined(
    target: str, swept: Sequence[str], fixed: dict[str, object], *, here: bool = True
) -> list[Combination]:
    """The runs that a preset or file asks for with ``--sweep`` and other settings on top; those that are not
    made ``here`` without the device that the user has chosen on this machine."""
    base, table = load_sweep(target)
    axes = axes_of(written_axes(table), [typed_axis(text) for text in swept], fixed)
    named = not here or "runtime.device" in {*fixed, *(axis.name for axis in axes)}
    return combinations(on_users_device(apply_overrides(base, fixed), named=named), axes)


def planned(found: Sequence[Combination], runs_dir: Path, jobs: int) -> SeveralPlans:
    """The plan of all of them, so many at a time (:func:`parts`)."""
    if is_virtual(existing(runs_dir)):
        check_runs_dir(runs_dir)  # its room would be the wrong thing to speak of
    return plan_several([one.config for one in found], runs_dir, jobs)


def print_plan(found: Sequence[Combination], plans: SeveralPlans, *, as_json: bool) -> int:
    """Print the plan of the whole; the exit code says whether all of it would run."""
    if as_json:
        tree = plans.to_dict()
        for one, row in zip(found, tree["runs"], strict=True):
            row["settings"] = one.settings
        print_json(tree)
    else:
        show(plan_text([one.settings for one in found], plans))
    try:
        _check_all(found, plans)
    except EqatError as error:
        if not as_json:
            raise
        return int(error.exit_code)  # the plan on stdout says it already
    return ExitCode.DONE


def _check_all(found: Sequence[Combination], plans: SeveralPlans) -> None:
    """Raise for the first run that does not fit, then for the disk."""
    for number, (one, run) in enumerate(zip(found, plans.runs, strict=True), 1):
        for obstacle in run.obstacles:
            error = obstacle.error
            where = f"{_title(number, one.settings)}: {error.where}"
            raise EqatError(error.message, where=where, hint=error.hint, exit_code=error.exit_code)
    plans.check_together()


def make(target: str, found: Sequence[Combination], plans: SeveralPlans, runs_dir: Path) -> Sweep:
    """A new sweep, with what stands in the way of single runs told.

    Raises:
        EqatError: where none of them fits, or all together do not.
    """
    check_runs_dir(runs_dir)
    if not plans.fitting:
        _check_all(found, plans)
    plans.check_together()
    say(f"{counted(len(found), 'run')}, {totals_words(plans)}")
    for number, (one, run) in enumerate(zip(found, plans.runs, strict=True), 1):
        for obstacle in run.obstacles[:1]:
            say(one_line(f"does not fit: {_title(number, one.settings)}: {obstacle.error}"))
    return Sweep.create(runs_dir, target, found)


def _title(number: int, settings: dict[str, Any]) -> str:
    return f"run {number} ({settings_words(settings)})"


def parts(found: Iterable[RunConfig], jobs: int) -> list[Share]:
    """What of the machine each of ``jobs`` runs at a time has; 0 is as many as there are GPUs for.

    Raises:
        UsageError: where there are not as many.
    """
    if jobs == 1:
        return [ALL]
    wanted = [config.runtime for config in found]
    together = max([1, *(one.gpus for one in wanted)])
    devices = [one.device for one in wanted]
    return shares(jobs, devices, visible_gpus(), sorted(os.sched_getaffinity(0)), together=together)


def detach(sweep: Sweep, *, jobs: int, as_json: bool) -> int:
    """Carry a sweep out in a process of its own, which no terminal can end."""
    parts((member.configuration() for member in sweep.members), jobs)  # what is wrong with it is told here
    with sweep.held():
        pass  # whoever carries it out already is named here, and not in a log
    child = start_detached(["sweep", "resume", str(sweep.path), f"--jobs={jobs}"], sweep.path / LOG)
    if as_json:
        print_json({"id": sweep.id, "path": str(sweep.path), "pid": child.pid})
    else:
        show(sweep.id)
    return ExitCode.DONE


def carry_out(sweep: Sweep, *, jobs: int, as_json: bool) -> int:
    """Make what is not made of a sweep, then show all of it; the exit code of the first run that failed, or
    that of the one that was stopped."""
    say(f"sweep {sweep.id}")
    with sweep.held():
        places = parts((member.configuration() for member in sweep.members), jobs)
        code = _Sweeper(sweep).make_all() if len(places) == 1 else Together(sweep, places).make_all()
    shown = show_sweep(sweep)
    if as_json:
        print_json(shown)
    else:
        show(sweep_text(shown))
    if any(row["outcome"] != "done" for row in shown["runs"]):
        say(f"eqat sweep resume {typed_path(sweep.path)} goes on with what is not done")
    return code


class _Sweeper:
    """One process that carries a sweep out."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._asked = False

    def make_all(self) -> int:
        """Every run that is not done, in order; a request to stop ends the row."""
        codes: dict[int, int] = {}
        with hearing(dict.fromkeys(STOPS, self._hear)):
            for number in self._order():
                member = self.sweep.members[number]
                run = self.sweep.run_of(member)
                if run is not None and state_of(run) == "done":
                    continue
                if self._asked:
                    return ExitCode.STOPPED
                title = f"[{number + 1}/{len(self.sweep.members)}] {cell(settings_words(member.settings))}"
                codes[number] = self._attempt(member, run, title)
                if codes[number] in ENDS:
                    return codes[number]
        return next((codes[number] for number in sorted(codes) if codes[number]), int(ExitCode.DONE))

    def _order(self) -> list[int]:
        """One after the other; what an earlier process has left at work comes first, so that nothing else is
        begun beside it."""
        runs = [self.sweep.run_of(member) for member in self.sweep.members]
        return sorted(range(len(runs)), key=lambda one: not is_at_work(runs[one]))

    def _attempt(self, member: Member, run: RunDirectory | None, title: str) -> int:
        """Make, start and follow one run; what prevents it is written down, and the others go on."""
        try:
            run = run if run is not None else made(self.sweep, member)
            say(f"{title}: run {run.id}")
            note(self.sweep, member, None)
            code = self._follow(run)
        except StopRequested:
            return ExitCode.STOPPED
        except Left:
            say("left; the engine goes on")
            return ExitCode.ABORTED
        except EqatError as error:
            say(f"{title}: error: {one_line(error_words(error))}")
            note(self.sweep, member, error)
            return int(error.exit_code)
        return code

    def _follow(self, run: RunDirectory) -> int:
        """Follow a run to its end: one that is at work already, else from its start."""
        follower = Follower(run, open_display())
        follower.catch_up()

        def start() -> int:
            if self._asked:  # before the follower took signals for itself
                raise StopRequested
            return launch(run)

        try:
            code = follower.follow(start=None if is_at_work(run) else start)
        finally:
            self._asked = self._asked or follower.asked_to_end
        if code == ExitCode.BUG:
            say(f"log: {shorten(log_path(run, follower.state.newest_attempt))}")
        return code

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Signal handler, between two runs: no other is begun."""
        self._asked = True
