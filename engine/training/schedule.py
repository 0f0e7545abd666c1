"""How the learning rate changes while it trains."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear"]
"""How it falls."""


def rate_factor(
    schedule: Schedule, step: int, steps: int, final_fraction: float, warmup_steps: int = 0
) -> float:
    """Multiplier of the learning rate for ``step`` (from 0): linear warm-up, then a cosine or a line to
    ``final_fraction``."""
    if schedule == "cosine":
        return cosine_factor(step, steps, final_fraction, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return final_fraction + (1 - final_fraction) * (1 - _position(step, steps, warmup_steps))


def cosine_factor(step: int, steps: int, final_fraction: float, warmup_steps: int = 0) -> float:
    """The same that falls as a cosine does."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    position = _position(step, steps, warmup_steps)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * position))


def _position(step: int, steps: int, warmup_steps: int) -> float:
    """How much of the way after the warm-up is done."""
    return min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
