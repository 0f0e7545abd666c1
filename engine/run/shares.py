"""What one of several engines on a machine may take of it: a GPU, several together, or some of the cores."""

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
    """The only ones that CUDA shows, as CUDA_VISIBLE_DEVICES names them."""
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


def shares(
    jobs: int, devices: Iterable[str], gpus: list[str], cores: list[int], *, together: int = 1
) -> list[Share]:
    """One for each of ``jobs`` runs at a time (0: as many as there are GPUs for) that compute on ``devices``,
    each on so many GPUs ``together``.

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
    room = len(gpus) // together
    jobs = jobs or max(1, room)
    if jobs > room:
        needed = "a GPU" if together == 1 else f"{together} GPUs"
        raise UsageError(
            f"{jobs} runs at a time need {needed} each, and {len(gpus)} can be seen",
            where="--jobs",
            hint=f"--jobs {room} at most" if room else f"--gpus {len(gpus)} at most",
        )
    named_so = [",".join(gpus[number * together : (number + 1) * together]) for number in range(jobs)]
    return [Share(name=f"GPU {gpu}" if together == 1 else f"GPUs {gpu}", gpu=gpu) for gpu in named_so]


def _cores_words(cores: tuple[int, ...]) -> str:
    return f"core {cores[0]}" if len(cores) == 1 else f"cores {cores[0]} to {cores[-1]}"
