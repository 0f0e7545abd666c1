"""Where a process stands among those that compute a run together, as its environment says: in torchrun's
variables, which is also how the first process tells those that it starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from engine.errors import PreflightError

LEADER = "EQAT_LEADER"
"""The process that started this one, which is the first of its run."""
LOCAL_HOST = "127.0.0.1"


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
        PreflightError: where torchrun has started another number of processes, or some on other machines.
    """
    size = _number(environment, "WORLD_SIZE")
    if gpus == 1 or size < 2 or "RANK" not in environment:
        return None
    if size != gpus:
        raise PreflightError(
            f"{size} processes were started for a run on {gpus} GPUs",
            where="WORLD_SIZE",
            hint=f"torchrun --nproc-per-node {gpus}",
        )
    if _number(environment, "LOCAL_WORLD_SIZE", size) != size:
        raise PreflightError(
            "a run computes on the GPUs of one machine",
            where="LOCAL_WORLD_SIZE",
            hint=f"torchrun --nnodes 1 --nproc-per-node {gpus}",
        )
    rank = _number(environment, "RANK")
    return Place(
        rank,
        size,
        _number(environment, "LOCAL_RANK", rank),
        environment.get("MASTER_ADDR", LOCAL_HOST),
        _number(environment, "MASTER_PORT", 29500),
        _number(environment, LEADER),
    )


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    value = environment.get(name, "")
    return int(value) if re.fullmatch(r"[0-9]{1,9}", value) else default
