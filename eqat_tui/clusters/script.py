"""The script that Slurm is given. It becomes the job's own program, which starts an engine on the job's run
(:mod:`eqat_tui.clusters.job`); so it is also what Slurm's warning reaches.

Options that sites and users may want otherwise are comments in it, and not on sbatch's command line, where
they would win."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from eqat_tui.clusters.asked import WARN_S

HEAD = f"""\
#!/bin/bash
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@{WARN_S}
"""
JOB = ("-P", "-m", "eqat_tui.clusters.job")


def script(place: Path, args: Sequence[str] = ()) -> str:
    """The script of a job that makes the run at ``place``, or of the task of an array that makes one of the
    sweep there; ``args`` are the engine's."""
    words = [sys.executable, *JOB, str(place), *args]
    return f"{HEAD}exec {shlex.join(words)}\n"


def named(name: str, log: str, array: str = "") -> list[str]:
    """Options of sbatch that say what the job is called, and where what it tells is written; in ``log`` %A,
    %a and %j stand for numbers."""
    return [f"--job-name={name}", f"--output={log}", *([f"--array={array}"] if array else [])]


def literal(path: Path) -> str:
    """A path in which nothing stands for a number."""
    return str(path).replace("%", "%%")


def array_of(numbers: Sequence[int], together: int) -> str:
    """``1-3,7%2``: tasks of an array with these numbers, so many of them at a time; 0 for any number."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    words = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
    return words + (f"%{together}" if together else "")
