"""What the parts of the soak share: a row of its table, and processes that are killed at a certain change."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
"""What Python announces before it changes a folder; between two of them a kill finds each state there is."""
LONGEST_S = 120.0


@dataclass
class Row:
    """One kind of interruption: how often it was tried, how often it struck, and where it did harm."""

    what: str
    tries: int = 0
    struck: int = 0
    """Kills that found somebody at work."""
    faults: list[str] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0

    def check(self, holds: bool, what: str) -> None:
        """Record what does not hold."""
        if not holds:
            self.faults.append(what)


def contents(folder: Path, *, without: Sequence[str] = ("lock",)) -> dict[str, str]:
    """SHA-256 of every file below ``folder``; a link counts by where it leads."""
    return dict(_contents(folder, without))


def _contents(folder: Path, without: Sequence[str]) -> Iterator[tuple[str, str]]:
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names if name not in without):
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
            yield str(path.relative_to(folder)), hashlib.sha256(content).hexdigest()


def eqat(*arguments: str, die_at: int | None = None) -> int:
    """``eqat ARGUMENTS`` in a process of its own, killed before its n-th change of a folder; its exit code,
    or less than 0 for the signal that killed it."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_eqat, args=(arguments, die_at, dict(os.environ)))
    process.start()
    process.join(LONGEST_S)
    assert process.exitcode is not None, f"eqat {' '.join(arguments)} hangs"
    return process.exitcode


def _eqat(arguments: Sequence[str], die_at: int | None, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    silence = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(silence, number)
    from eqat_tui.cli import main

    if die_at is not None:
        die_before_change(die_at)
    main(arguments)


def die_before_change(number: int) -> None:
    """In this process: SIGKILL just before it changes a folder for the n-th time from now."""
    seen = 0

    def count(event: str, _: object) -> None:
        nonlocal seen
        if event in CHANGES:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
