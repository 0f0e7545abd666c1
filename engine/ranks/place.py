"""Where a process stands among those that compute a run together, as its environment says: in torchrun's
variables, which is also how the first process tells those that it starts, or in those of a Slurm step."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from engine.errors import PreflightError, UsageError
from engine.run.launch import ATTEMPT_VARIABLE

LEADER = "EQAT_LEADER"
"""The process that started this one, which is the first of its run."""
LOCAL_HOST = "127.0.0.1"
STEP_TASKS = "SLURM_STEP_NUM_TASKS"
"""Processes of a Slurm step: ``srun`` sets it, and ``sbatch`` and ``salloc`` do not, which say of a job's
script too that it is process 0 of ``SLURM_NTASKS``."""
FIRST_PORT, PORTS = 10000, 20000
"""Where a step's processes may meet: below the ports that the kernel gives to whoever asks for any."""


class Place(NamedTuple):
    """One of several processes."""

    rank: int
    size: int
    local: int
    """Its number on this machine, which is its GPU's."""
    host: str
    port: int
    """Where all of them meet."""
    leader: int = 0
    """The process that started it; 0 where something else did."""
    restarts: int = 0
    """How often torchrun has begun all of them anew: what they said before is still there where they meet."""

    def variables(self) -> dict[str, str]:
        """What tells a process that it is this one."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local),
            "LOCAL_WORLD_SIZE": str(self.size),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
            LEADER: str(self.leader),
        }


def place_of(gpus: int, environment: Mapping[str, str] = os.environ) -> Place | None:
    """Of this process, which computes a run on so many GPUs; none where nobody has started others beside it.

    Raises:
        PreflightError: where another number of processes was started, or some on other machines.
    """
    if gpus == 1 or _was_launched(environment):
        return None
    return _of_torchrun(gpus, environment) if "RANK" in environment else _of_step(gpus, environment)


def rank_told(environment: Mapping[str, str] = os.environ) -> str:
    """What the environment says of this process's rank, whether or not its run has others; empty where it
    says nothing."""
    if _was_launched(environment):
        return ""
    return environment.get("RANK") or (environment["SLURM_PROCID"] if _step_tasks(environment) > 1 else "")


def refuse_one_of_several(gpus: int, environment: Mapping[str, str] = os.environ) -> None:
    """For a command that starts the engine of a run on so many GPUs: called in each of several processes, it
    would make a run in each.

    Raises:
        UsageError: where torchrun or a Slurm step has started a process for each GPU.
    """
    size, step = _number(environment, "WORLD_SIZE"), _step_tasks(environment)
    if gpus > 1 and "RANK" in environment and size > 1:
        raise _one_each(size, "WORLD_SIZE", "without torchrun", f"torchrun --nproc-per-node {gpus} -m")
    if gpus > 1 and "RANK" not in environment and step == gpus:
        raise _one_each(step, STEP_TASKS, "by srun --ntasks=1", f"srun --ntasks={gpus} python -m")


def _one_each(size: int, where: str, how: str, engine: str) -> UsageError:
    return UsageError(
        f"each of {size} processes would make a run of its own",
        where=where,
        hint=f"call it once, {how}: it starts a process for each GPU; or {engine} engine RUN, of a run that "
        "is there",
    )


def _was_launched(environment: Mapping[str, str]) -> bool:
    """Whether a command of ours started this engine: as one process, whatever the command itself was started
    in."""
    return ATTEMPT_VARIABLE in environment and LEADER not in environment


def _of_torchrun(gpus: int, environment: Mapping[str, str]) -> Place | None:
    size = _number(environment, "WORLD_SIZE")
    if size < 2:
        return None
    if size != gpus:
        raise _another_number(size, gpus, "WORLD_SIZE", f"torchrun --nproc-per-node {gpus}")
    if _number(environment, "LOCAL_WORLD_SIZE", size) != size:
        raise _other_machines("LOCAL_WORLD_SIZE", f"torchrun --nnodes 1 --nproc-per-node {gpus}")
    rank, leader = _number(environment, "RANK"), _number(environment, LEADER)
    return Place(
        rank,
        size,
        _number(environment, "LOCAL_RANK", rank),
        environment.get("MASTER_ADDR", LOCAL_HOST),
        _number(environment, "MASTER_PORT", 29500),
        leader,
        0 if leader else _number(environment, "TORCHELASTIC_RESTART_COUNT"),
    )


def _of_step(gpus: int, environment: Mapping[str, str]) -> Place | None:
    size = _step_tasks(environment)
    if size < 2:
        return None
    if size != gpus:
        raise _another_number(size, gpus, STEP_TASKS, f"srun --nodes=1 --ntasks={gpus}")
    if _number(environment, "SLURM_STEP_NUM_NODES", 1) > 1:
        raise _other_machines("SLURM_STEP_NUM_NODES", f"srun --nodes=1 --ntasks={gpus}")
    rank = _number(environment, "SLURM_PROCID")
    # All of them know the job and the step. Of two steps that came to one port, the second would be refused.
    port = FIRST_PORT + (int(environment["SLURM_JOB_ID"]) + 1009 * int(environment["SLURM_STEP_ID"])) % PORTS
    return Place(
        rank,
        size,
        _number(environment, "SLURM_LOCALID", rank),
        LOCAL_HOST,
        _number(environment, "MASTER_PORT", port),
    )


def _step_tasks(environment: Mapping[str, str]) -> int:
    """Processes of the Slurm step that this one is a task of; 0 outside of any.

    A job that was submitted from within a step inherits what was said of that one. Slurm says anew, of the
    job's script too, which tasks there are on this machine.
    """
    told = [environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID")]
    size = _number(environment, STEP_TASKS)
    if not all(re.fullmatch(r"[0-9]{1,10}", one) for one in told) or int(told[2]) >= size:
        return 0
    here = environment.get("SLURM_GTIDS")
    if here is None or _number(environment, "SLURM_STEP_NUM_NODES", 1) > 1:
        return size
    return size if here.count(",") + 1 == size else 0


def _another_number(size: int, gpus: int, where: str, hint: str) -> PreflightError:
    return PreflightError(f"{size} processes were started for a run on {gpus} GPUs", where=where, hint=hint)


def _other_machines(where: str, hint: str) -> PreflightError:
    return PreflightError("a run computes on the GPUs of one machine", where=where, hint=hint)


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    value = environment.get(name, "")
    return int(value) if re.fullmatch(r"[0-9]{1,9}", value) else default
