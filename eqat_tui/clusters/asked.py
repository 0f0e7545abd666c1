"""What is asked of Slurm for a run, from what was typed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from engine.errors import UsageError

if TYPE_CHECKING:  # commands that only look at something load this module, and no configuration
    from engine.config.run import RunConfig

WARN_S = 120
"""Seconds before its end that a job is warned: time for a checkpoint."""
OURS = (
    "--job-name",
    "-J",
    "--array",
    "-a",
    "--parsable",
    "--wrap",
    "--test-only",
    "--wait",
    "-W",
    "--input",
    "-i",
)
"""Options of sbatch that are not the user's to choose."""
_TIME = re.compile(r"[0-9]+(?::[0-9]+){0,2}|[0-9]+-[0-9]+(?::[0-9]+){0,2}")
_MEMORY = re.compile(r"[0-9]+[KMGT]?", re.IGNORECASE)
_GPUS = ("--gres", "--gpus", "-G", "--gpus-per-node", "--gpus-per-task", "--gpus-per-socket")


class AskedOfSlurm(NamedTuple):
    """Where and for how long a job may run, and what it is given; empty or 0 is the cluster's default."""

    partition: str = ""
    account: str = ""
    time: str = ""
    """As Slurm takes it: minutes, ``4:00:00``, ``2-12``."""
    cpus: int = 0
    memory: str = ""
    """Of the host, as Slurm takes it: ``64G``."""
    more: tuple[str, ...] = ()
    """Options of sbatch, as they are; they come last, and win."""

    @property
    def is_default(self) -> bool:
        """Whether nothing was typed."""
        return self == AskedOfSlurm()

    def check(self) -> None:
        """UsageError for what Slurm would not understand, or would understand as something else."""
        for name, value in (("--partition", self.partition), ("--account", self.account)):
            if value and not re.fullmatch(r"[A-Za-z0-9_.,@+][A-Za-z0-9_.,@+-]*", value):
                raise UsageError(f"{value!r} is no name", where=name)
        if self.time and not _TIME.fullmatch(self.time):
            raise UsageError(
                f"{self.time!r} is no time of Slurm's",
                where="--time",
                hint="like 90 (minutes), 4:00:00 or 2-12",
            )
        if self.memory and not _MEMORY.fullmatch(self.memory):
            raise UsageError(f"{self.memory!r} is no size of Slurm's", where="--memory", hint="like 64G")
        if self.cpus < 0:
            raise UsageError(f"{self.cpus} is no number of cores", where="--cpus")
        for option in self.more:
            name = option.partition("=")[0]
            if not re.match(r"--?[A-Za-z]", option):
                raise UsageError(
                    f"{option!r} is no option", where="--sbatch", hint="like --sbatch=--nice=100"
                )
            # getopt takes the beginning of a long option for it, and what follows a letter for its value.
            long = name.startswith("--") and any(own.startswith(name) for own in OURS)
            if long or (not name.startswith("--") and option[:2] in OURS):
                raise UsageError(f"{name} is not to be chosen", where="--sbatch", hint="eqat sets it itself")

    def options(self, configs: Sequence[RunConfig]) -> list[str]:
        """Options of sbatch for a job that makes one of ``configs``."""
        gpus = max(_gpus(config) for config in configs)
        named = any(option.partition("=")[0] in _GPUS or option[:2] == "-G" for option in self.more)
        found = {
            "--partition": self.partition,
            "--account": self.account,
            "--time": self.time,
            "--gres": f"gpu:{gpus}" if gpus and not named else "",
            "--cpus-per-task": str(self.cpus or ""),
            "--mem": self.memory,
        }
        return [*(f"{name}={value}" for name, value in found.items() if value), *self.more]


def _gpus(config: RunConfig) -> int:
    """How many GPUs a run computes on; none where it is to compute on the processor."""
    return 0 if config.runtime.device == "cpu" else config.runtime.gpus


def goes_to_slurm(on: str, asked: AskedOfSlurm) -> bool:
    """Whether Slurm is to make the runs.

    Raises:
        UsageError: for a place that there is not, and for what is asked of Slurm without it.
    """
    if on not in ("local", "slurm"):
        raise UsageError(f"there is no {on!r}", where="--on", hint="local or slurm")
    if on == "local" and not asked.is_default:
        raise UsageError("are options of a cluster's", where="--partition and the like", hint="--on slurm")
    asked.check()
    return on == "slurm"
