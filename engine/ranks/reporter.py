"""What another process than the first has to say: into its own log, and no more."""

from __future__ import annotations

import sys

import torch

from engine.errors import StopRequested
from engine.reporter import Reporter
from engine.run.directory import RunDirectory
from engine.system.printable import printable


class QuietReporter(Reporter):
    """Writes nothing into the run, and hears no request: the first process does both."""

    def __init__(self, run: RunDirectory, attempt: int, device: torch.device, rank: int) -> None:
        super().__init__(run, attempt, device, rank)

    def stop_asked(self) -> StopRequested | None:
        self.beat()
        return None

    def warning(self, code: str, message: str, hint: str = "") -> None:
        line = f"{code}: {message}{f' ({hint})' if hint else ''}"
        print(printable(line), file=sys.stderr, flush=True)

    def pause(self, why: str) -> None:
        self.waiting = why
        print(printable(why), file=sys.stderr, flush=True)

    def go_on(self) -> float:
        self.waiting = ""
        return 0.0
