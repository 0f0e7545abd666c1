"""The downcasting operator of LR-QAT (arXiv 2406.06385, section 3): latents kept in less than float32.

A latent ``V = W / s`` is a weight counted in grid steps (:mod:`engine.quant.grid`). On a grid of ``b`` bits
with the zero point ``z`` its integer is ``clamp(round(V) + z, 0, 2^b - 1)``, and what is kept of it is one of

    bfloat16, float16   V, rounded to the nearest number of the type      off by at most 2^-8 |V|, 2^-11 |V|
    fixed               Q(b).(8-b): V + z - 2^(b-1), clipped to what the grid holds, in steps of 2^-(8-b) of
                        one, an int8                                      off by at most 2^-(9-b) inside
    integer             the integer itself, b bits packed densely         off by at most 1/2 inside

On a symmetric grid, ``z = 2^(b-1)``, ``fixed`` is the published form; on any other the zero point moves the
window of the same width to where the grid lies. Which form a tensor has shows in its type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config.grid import Grid
from engine.config.latents import Downcast
from engine.quant.packing import bitpack, bitunpack

LARGEST = 6e4
"""A float latent is held within this: next to nothing of a scale must not become an infinity."""


def downcast(steps_OI: Tensor, zero_point_OG: Tensor, grid: Grid, form: Downcast) -> Tensor:
    """Latents ``[O, I]`` in ``form``: ``[O, I]``, or as integers int32 words ``[O, I*bits/32]``."""
    if form == "bfloat16" or form == "float16":
        return steps_OI.clamp(-LARGEST, LARGEST).to(getattr(torch, form))
    zero = zero_point_OG.float().unsqueeze(-1)
    steps_OGg = steps_OI.float().reshape(*zero_point_OG.shape, -1)
    if form == "integer":
        codes = steps_OGg.round().add_(zero).clamp_(0, grid.top).to(torch.uint8)
        return bitpack(codes.reshape(steps_OI.shape), grid.bits, dim=1)
    centred = (steps_OGg + zero).sub_(grid.middle).clamp_(-grid.middle, grid.middle - 1)
    return centred.mul_(_parts(grid)).round_().to(torch.int8).reshape(steps_OI.shape)


def upcast(kept: Tensor, zero_point_OG: Tensor, grid: Grid) -> Tensor:
    """The latents again, float32 ``[O, I]``, in memory of their own; ``zero_point`` is that of
    :func:`downcast`."""
    if kept.is_floating_point():
        return kept.to(torch.float32, copy=True)
    offset = zero_point_OG.float().unsqueeze(-1)
    if kept.dtype == torch.int32:
        steps = bitunpack(kept, grid.bits, dim=1).float()
    else:
        steps = kept.float().div_(_parts(grid))  # a power of two, so nothing is lost
        offset = offset - grid.middle
    return steps.view(*offset.shape[:2], -1).sub_(offset).view(steps.shape)


def _parts(grid: Grid) -> int:
    """Into so many parts ``fixed`` divides a grid step."""
    return 1 << (8 - grid.bits)
