"""Which machine this is, and what of a cluster this process is.

A host's name does not tell machines apart: containers of one machine have names of their own, and see each
other's locks all the same. What the kernel drew when it booted does. Of a process in a batch job, the job is
known by the environment that Slurm gives it."""

from __future__ import annotations

import functools
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
JOB = re.compile(r"[0-9]{1,10}(?:_[0-9]{1,10})?")
"""A job of Slurm's; of an array of jobs the array's number and the task's."""


@functools.cache
def identity() -> str:
    """The same for all processes that one kernel runs, and for no other; the host's name where it is not
    told."""
    try:
        found = BOOT_ID.read_text(errors="replace").strip()
    except OSError:
        found = ""
    return found or socket.gethostname()


def node() -> str:
    """What users call this machine: the name of its node in a job of Slurm's, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def batch_job(environment: Mapping[str, str] = os.environ) -> str:
    """The job that this process belongs to, as ``123`` or ``123_4``; empty outside of one."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    found = f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")
    return found if JOB.fullmatch(found) else ""


def batch_restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often that job was begun before."""
    found = environment.get("SLURM_RESTART_COUNT", "0")
    return int(found) if re.fullmatch(r"[0-9]{1,9}", found) else 0
