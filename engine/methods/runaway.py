"""A training whose scales have run away: nothing about it is infinite, since scales are kept within what a
file can hold, and nothing of the model is left."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.errors import NonFiniteError
from engine.quant.packed import LARGEST_STORED_SCALE
from engine.training.loop import NON_FINITE_HINT


@torch.no_grad()
def refuse_runaway(scales: Iterable[Tensor], steps: int, where: str) -> None:
    """NonFiniteError when one of the trained ``scales`` has reached the largest that a file can hold."""
    largest = max((scale.abs().max().item() for scale in scales), default=0.0)
    if largest >= LARGEST_STORED_SCALE:
        raise NonFiniteError(
            f"a scale has grown to {LARGEST_STORED_SCALE:g}, beyond which no file can hold it, "
            f"after {steps} steps",
            where=where,
            hint=NON_FINITE_HINT,
        )
