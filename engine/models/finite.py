"""Whether the numbers of a tensor are numbers: asked of every weight that is read."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def finite(tensor: Tensor) -> bool:
    """Whether all of its numbers are finite.

    The least and the largest tell: both are NaN where any number is. An answer for every element would take a
    CPU twenty times as long, and of a large embedding be large as well.
    """
    return not tensor.numel() or all(math.isfinite(end) for end in torch.stack(tensor.aminmax()).tolist())
