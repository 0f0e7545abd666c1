"""What this process may have of its machine: the limits that a container, a batch job or a service sets.

A machine of 128 cores whose container may use 16 of them shows all 128, and so does its memory; only the
control groups tell. Each group of the way down to this process's own may set a limit, and the narrowest one
holds. Both versions are read, of Linux's documentation: ``Documentation/admin-guide/cgroup-v2.rst`` and
``cgroup-v1/memory.rst``, ``scheduler/sched-bwc.rst``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
MOST_BESIDE_A_GPU = 16
"""Threads of the processor where a GPU computes: what is left is small, and more of them wait for each other
longer than they work, above all where others use the machine too."""


def threads(asked: int, processes: int, *, gpu: bool, there: int) -> int:
    """With which each of so many ``processes`` computes on the processors that are ``there``; none ``asked``
    for is 0."""
    if asked:
        return asked
    each = max(1, there // processes)
    return min(each, MOST_BESIDE_A_GPU) if gpu else each


def processors() -> int:
    """That this process may keep busy: those that it may run on, and no more than its time is worth."""
    try:
        found = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        found = os.cpu_count() or 1
    times = [found, *(math.ceil(time) for time in _times() if time > 0)]
    return max(1, min(times))


def memory_available() -> int:
    """Bytes that can still be had: what the kernel says, or what a limit leaves of it."""
    import psutil

    available = int(psutil.virtual_memory().available)
    left = memory_left()
    return available if left is None else min(available, left)


def memory_left() -> int | None:
    """Bytes until the narrowest limit; none without one."""
    return min(_left(), default=None)


def _times() -> Iterator[float]:
    """Seconds of processors in a second, as each group allows them."""
    for group in _groups(""):
        quota, _, period = _word(group / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)
    for group in _groups("cpu"):
        quota, period = _word(group / "cpu.cfs_quota_us"), _word(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # "-1" is no limit
            yield int(quota) / int(period)


def _left() -> Iterator[int]:
    """Bytes that each group with a limit leaves. Pages of files count as free: the kernel drops them."""
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    second = ("memory.max", "memory.current", "inactive_file")
    for groups, (limit, used, pages) in ((_groups("memory"), first), (_groups(""), second)):
        for group in groups:
            most, now = _word(group / limit), _word(group / used)
            if most.isdecimal() and now.isdecimal():  # "max" is no limit
                yield max(0, int(most) - int(now) + _counted(group / "memory.stat", pages))


def _groups(controller: str) -> Iterable[Path]:
    """Folders of this process's own group and of those that it lies in; of version 2 for no controller."""
    try:
        lines = OWN.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    root = GROUPS / controller
    found = {root: None}
    for line in lines:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if (number == "0" and not names) if not controller else controller in names.split(","):
            # A container sees its own groups only: what the path names may lie outside of them.
            parts = [part for part in path.split("/") if part]
            if ".." not in parts:
                found |= {root.joinpath(*parts[:depth]): None for depth in range(1, len(parts) + 1)}
    return found


def _word(path: Path) -> str:
    """What a file of one line says; nothing where there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _counted(path: Path, name: str) -> int:
    """A number of a file of names and numbers; 0 where it is not told."""
    for line in _word(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return 0
