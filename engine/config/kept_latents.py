"""Which latents Block-AP and GPTQ keep with their blocks, for a stage behind them that starts from these."""

from __future__ import annotations

from engine.config.latents import Downcast
from engine.config.run import RunConfig

KEPT_FOR_WEIGHTS: Downcast = "float16"
"""How they keep what E2E-QAT starts from."""


def kept_latents(config: RunConfig) -> Downcast | None:
    """How the stage that makes blocks keeps its latents; none where nothing starts from them, and for the
    integers alone, which a block has anyway."""
    low_rank, weights = config.lr_qat, config.e2e_qat
    if low_rank.enabled and low_rank.start == "latents" and low_rank.downcast != "integer":
        return low_rank.downcast
    return KEPT_FOR_WEIGHTS if weights.enabled and weights.start == "latents" else None
