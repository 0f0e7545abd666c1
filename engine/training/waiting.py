"""How long a process of several waits for the others in a step: whoever waits least is the slowest."""

from __future__ import annotations

import time
from typing import Any

import torch

from engine.training.world import World


class Waiting:
    """Around what ranks do together, on the device's own time line."""

    def __init__(self, world: World, device: torch.device) -> None:
        self._world, self._cuda = world, device.type == "cuda"
        self._marks: list[Any] = []

    def begin(self) -> None:
        """This rank has come so far; the others may not have."""
        if self._world.several:
            self._marks = [self._mark()]

    def end(self) -> None:
        """All have, and what they add up is added up."""
        if self._world.several:
            self._marks.append(self._mark())

    def note(self) -> None:
        """Tell it the world, where the device has been waited for anyway."""
        if len(self._marks) == 2:
            begun, ended = self._marks
            self._world.note_wait(begun.elapsed_time(ended) / 1e3 if self._cuda else ended - begun)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
