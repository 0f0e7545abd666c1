"""What one of several engines on a machine may take of it: a GPU, or some of the cores."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress

import msgspec

from engine.errors import UsageError


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the machine."""

    name: str = ""
    """In words; empty: all of it."""
    gpu: str = ""
    """The only one that CUDA shows, as CUDA_VISIBLE_DEVICES names it."""
    cores: tuple[int, ...] = ()
    """The only ones that it computes on."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What the engine is started with beside its own."""
        return {"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu else {}

    def confine(self, pid: int) -> None:
        """Keep a process that has just been started on its cores."""
        if self.cores:
            with suppress(OSError):  # it has ended already, which whoever waits for it is told
                os.sched_setaffinity(pid, self.cores)


ALL = Share()


def shares(jobs: int, devices: Iterable[str], gpus: list[str], cores: list[int]) -> list[Share]:
    """One for each of ``jobs`` runs at a time (0: as many as there are GPUs) that compute on ``devices``.

    Raises:
        UsageError: for more runs than there are GPUs or cores, and where a run names its GPU itself.
    """
    wanted = set(devices)
    if not gpus or wanted == {"cpu"}:
        jobs = jobs or 1
        if jobs > len(cores):
            raise UsageError(
                f"{jobs} runs at a time need a core each, and there are {len(cores)}",
                where="--jobs",
                hint=f"--jobs {len(cores)} at most",
            )
        each = len(cores) // jobs
        parts = [tuple(cores[number * each : (number + 1) * each]) for number in range(jobs)]
        return [Share(name=_cores_words(part), cores=part) for part in parts]
    named = sorted(device for device in wanted if ":" in device)
    if named:
        raise UsageError(
            f"is {named[0]}, and each of several runs at a time has a GPU of its own",
            where="runtime.device",
            hint="leave it at auto; CUDA_VISIBLE_DEVICES says which GPUs are taken",
        )
    jobs = jobs or len(gpus)
    if jobs > len(gpus):
        raise UsageError(
            f"{jobs} runs at a time need a GPU each, and {len(gpus)} can be seen",
            where="--jobs",
            hint=f"--jobs {len(gpus)} at most",
        )
    return [Share(name=f"GPU {gpu}", gpu=gpu) for gpu in gpus[:jobs]]


def _cores_words(cores: tuple[int, ...]) -> str:
    return f"core {cores[0]}" if len(cores) == 1 else f"cores {cores[0]} to {cores[-1]}"
