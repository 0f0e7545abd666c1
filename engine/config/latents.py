"""Latents: what a weight was before it was rounded, counted in grid steps, and how cheaply it is kept.

A stage of the whole network that may change integers starts at them, or at the latents behind them. Of blocks
that were only rounded to nearest these are the original weights, which can be read again; Block-AP's and
GPTQ's own are gone after them, so they keep them with their blocks where such a stage is to come.
"""

from __future__ import annotations

from typing import Literal

Downcast = Literal["bfloat16", "float16", "fixed", "integer"]
"""How latents are kept (:mod:`engine.quant.downcast`)."""
Start = Literal["latents", "integers"]
"""Where a training of the whole network starts."""

FIXED_BITS = 8
"""A latent in fixed point takes so many; what the grid's whole numbers do not take is its fraction."""


def downcast_bits(form: Downcast, bits: int) -> int:
    """Bits that a latent of a grid of ``bits`` bits takes."""
    return {"bfloat16": 16, "float16": 16, "fixed": FIXED_BITS, "integer": bits}[form]
