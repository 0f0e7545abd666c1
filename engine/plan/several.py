"""The plan of several runs that are made one after the other: time and disk of all of them together."""

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
    seconds: float
    """Of the runs that fit, one after the other."""
    disk_bytes: int
    """The most that they hold together: what those before have left, and what one grows to."""
    kept_bytes: int
    """What all leave."""
    disk_free: int

    @property
    def fitting(self) -> list[int]:
        """Which of them fit, each alone."""
        return [number for number, run in enumerate(self.runs) if not run.obstacles]

    def check_disk(self) -> None:
        """PreflightError where each may fit alone and all together do not."""
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


def plan_several(configs: Sequence[RunConfig], runs_dir: Path) -> SeveralPlans:
    """Plan each of ``configs`` on this machine, and all of them as a row of runs in ``runs_dir``."""
    runs = tuple(_planned(config, runs_dir) for config in configs)
    left = most = 0
    seconds = 0.0
    for run in runs:
        if run.plan is not None and not run.obstacles:
            most = max(most, left + run.plan.disk_bytes)
            left += run.kept_bytes
            seconds += run.plan.seconds
    return SeveralPlans(
        runs=runs,
        seconds=seconds,
        disk_bytes=most,
        kept_bytes=left,
        disk_free=shutil.disk_usage(existing(runs_dir)).free,
    )


def _planned(config: RunConfig, runs_dir: Path) -> Planned:
    try:
        plan = make_plan(config, runs_dir=runs_dir)
    except EqatError as error:
        code = int(error.exit_code)
        obstacle = Obstacle(where=error.where, message=error.message, hint=error.hint, exit_code=code)
        return Planned(plan=None, obstacles=(obstacle,))
    found = (Obstacle(where=one.where, message=one.message, hint=one.hint) for one in plan.problems)
    return Planned(plan=plan, obstacles=tuple(found))
