"""The plan of several runs that are made one after the other, or some at a time: time and disk of all of them
together."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine.config.run import RunConfig
from engine.errors import EqatError, ExitCode, PreflightError
from engine.plan.estimate import size_text
from engine.plan.plan import Plan, make_plan
from engine.system.files import existing


class Obstacle(msgspec.Struct, frozen=True, kw_only=True):
    """Why one of the runs could not start."""

    where: str
    message: str
    hint: str
    exit_code: int = int(ExitCode.PREFLIGHT)

    @property
    def error(self) -> EqatError:
        """The same as the error that a run ends with."""
        code = ExitCode(self.exit_code)
        return EqatError(self.message, where=self.where, hint=self.hint, exit_code=code)


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """One of the runs."""

    plan: Plan | None
    """None where the model or the text cannot be had, so that there is nothing to plan."""
    obstacles: tuple[Obstacle, ...]

    @property
    def kept_bytes(self) -> int:
        """What is left on the disk once the run is done, at most."""
        return self.plan.phases[-1].peak_disk_bytes if self.plan is not None else 0


class SeveralPlans(msgspec.Struct, frozen=True, kw_only=True):
    """All of them."""

    runs: tuple[Planned, ...]
    jobs: int
    """So many are made at a time."""
    seconds: float
    """Of the runs that fit, from the first to the last."""
    disk_bytes: int
    """The most that they hold together: what those before have left, and what those at work grow to."""
    kept_bytes: int
    """What all leave."""
    disk_free: int

    @property
    def fitting(self) -> list[int]:
        """Which of them fit, each alone."""
        return [number for number, run in enumerate(self.runs) if not run.obstacles]

    def check_together(self) -> None:
        """PreflightError where each may fit alone and all together do not."""
        plans = [run.plan for run in self.runs if run.plan is not None and not run.obstacles]
        needed = sum(sorted((plan.peak_host_bytes for plan in plans), reverse=True)[: self.jobs])
        if self.jobs > 1 and plans and needed > plans[0].machine.host_free:
            raise PreflightError(
                f"{self.jobs} runs at a time need {size_text(needed)}, and "
                f"{size_text(plans[0].machine.host_free)} are free",
                where="host memory",
                hint="make fewer at a time: --jobs",
            )
        if self.disk_bytes > self.disk_free:
            raise PreflightError(
                f"all runs together need {size_text(self.disk_bytes)}, and {size_text(self.disk_free)} are "
                "free",
                where="disk",
                hint="free some space, choose another --runs-dir, or sweep less",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        result: dict[str, Any] = msgspec.to_builtins(self)
        return result


def plan_several(configs: Sequence[RunConfig], runs_dir: Path, jobs: int = 1) -> SeveralPlans:
    """Plan each of ``configs`` on this machine, and all of them in ``runs_dir``, ``jobs`` at a time."""
    runs = tuple(_planned(config, runs_dir) for config in configs)
    fitting = [run for run in runs if run.plan is not None and not run.obstacles]
    return SeveralPlans(
        runs=runs,
        jobs=jobs,
        seconds=_seconds([run.plan.seconds for run in fitting if run.plan], jobs),
        disk_bytes=_most(fitting, jobs),
        kept_bytes=sum(run.kept_bytes for run in fitting),
        disk_free=shutil.disk_usage(existing(runs_dir)).free,
    )


def _seconds(each: Sequence[float], jobs: int) -> float:
    """Until the last is done, where the next one begins as soon as there is room."""
    ends = [0.0] * jobs
    for seconds in each:
        ends[ends.index(min(ends))] += seconds
    return max(ends)


def _most(runs: Sequence[Planned], jobs: int) -> int:
    """What ``runs`` hold at most: one grows to its worst moment, some of those before are still at theirs,
    and the others have left something."""
    most = left = 0
    growing: list[int] = []
    for run in runs:
        assert run.plan is not None
        left += run.kept_bytes
        grown = run.plan.disk_bytes - run.kept_bytes
        most = max(most, left + grown + sum(sorted(growing, reverse=True)[: jobs - 1]))
        growing.append(grown)
    return most


def _planned(config: RunConfig, runs_dir: Path) -> Planned:
    try:
        plan = make_plan(config, runs_dir=runs_dir)
    except EqatError as error:
        code = int(error.exit_code)
        obstacle = Obstacle(where=error.where, message=error.message, hint=error.hint, exit_code=code)
        return Planned(plan=None, obstacles=(obstacle,))
    found = (Obstacle(where=one.where, message=one.message, hint=one.hint) for one in plan.problems)
    return Planned(plan=plan, obstacles=tuple(found))
