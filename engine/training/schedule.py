"""How the learning rate changes while it trains."""

from __future__ import annotations

import math


def cosine_factor(step: int, steps: int, final_fraction: float, warmup_steps: int = 0) -> float:
    """Multiplier of the learning rate for ``step`` (from 0): linear warm-up, then a cosine to
    ``final_fraction``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    position = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, position)))
