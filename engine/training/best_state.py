"""Two copies of what is trained: as it was at the start, and where it validated best."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from engine.training.snapshot import Snapshot


class BestState:
    """The parameters' values at the start, and where they validated best.

    A GPU's memory is the scarcer one and these are read at most once or twice, so they lie on the host.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.start = self._copy()
        self.best: list[Tensor] | None = None
        self.val_loss: float | None = None

    def _copy(self) -> list[Tensor]:
        return [_aside(p.detach()) for p in self.parameters]

    @torch.no_grad()
    def _load(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def keep_if_best(self, val_loss: float | None, *, at_start: bool = False) -> bool:
        """Remember the current values if ``val_loss`` is the lowest so far; whether it is. ``at_start`` says
        that nothing was trained yet, so that there is nothing to copy."""
        if val_loss is None or not val_loss < (math.inf if self.val_loss is None else self.val_loss):
            return False
        self.val_loss = val_loss
        if at_start:
            self.best = self.start
        elif self.best is None or self.best is self.start:
            self.best = self._copy()
        else:  # in place: a third copy would be one too many
            for value, parameter in zip(self.best, self.parameters, strict=True):
                value.copy_(parameter.detach())
        return True

    def load_best(self) -> None:
        """Put the best values in place; without any validation the current ones stay."""
        if self.best is not None:
            self._load(self.best)

    def restart(self) -> None:
        """Back to the start, as if nothing had been trained or validated."""
        self._load(self.start)
        self.best = self.val_loss = None

    def state_dict(self) -> Snapshot:
        """The best values. Those of the start are not kept: they come from the model again."""
        best = {} if self.best is None else {str(index): value for index, value in enumerate(self.best)}
        return Snapshot(best, {"val_loss": self.val_loss})

    def load_state_dict(self, snapshot: Snapshot) -> None:
        """Remember what another one of the same parameters did."""
        self.val_loss = snapshot.facts["val_loss"]
        values = [snapshot.tensors.get(str(index)) for index in range(len(self.parameters))]
        self.best = [value for value in values if value is not None] or None


def _aside(value: Tensor) -> Tensor:
    """A copy in host memory; page-locked, which is several times faster to copy to, for a GPU."""
    copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return copy.copy_(value)
