"""Quantized linears in GGUF's blocks, written from their integers.

A row is blocks of 32 weights (64 for Q2_0), each a float16 ``d`` and the numbers ``q``; of Q4_1 a float16
``m`` stands between them. A group of ours is several blocks with the same ``d``.

    Q2_0   18 bytes   w = (q - 1) * d   number j in byte j // 4, at bits 2 (j % 4)
    Q4_0   18 bytes   w = (q - 8) * d   byte j: number j in the low half, number j + 16 in the high one
    Q4_1   20 bytes   w = q * d + m     the same
    Q8_0   34 bytes   w = q * d         one signed byte each

The first two differ from ours in where their zero lies: ``q - zero`` moves there as it is. At two bits and a
fixed zero point of 2 it runs from -2 to 1, and Q2_0 from -1 to 2: there ``d`` is the negative scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.architecture.gguf_writing import block_type
from engine.errors import PreflightError
from engine.models.gguf_names import permute_rotary
from engine.quant.packed import PackedWeight

Bytes = NDArray[np.uint8]
Steps = NDArray[np.int8] | NDArray[np.int16]


def blocks_of(name: str, weight: PackedWeight, heads: int = 0) -> tuple[str, Bytes]:
    """Type and bytes ``[O, row]`` of a linear; ``heads`` whose rows llama.cpp wants in its own order.

    Raises:
        PreflightError: for integers that the type does not reach, or a scale that float16 cannot hold.
    """
    kind = block_type(weight.grid, weight.in_features)
    each = 64 if kind == "Q2_0" else 32
    codes, zero, scale = weight.codes(), weight.zero_point, weight.scale.to(torch.float16)
    if not torch.isfinite(scale).all():
        raise PreflightError("a scale does not fit float16", where=name)
    if heads:
        codes, zero, scale = (permute_rotary(part, heads) for part in (codes, zero, scale))
    repeat = weight.group_size // each
    q = codes.numpy().reshape(codes.shape[0], -1, each)
    z = zero.numpy().repeat(repeat, axis=1)[..., None]
    d = scale.numpy().repeat(repeat, axis=1)[..., None]
    if kind == "Q4_1":
        m = -(z.astype(np.float32) * d.astype(np.float32))
        return kind, _rows(_bytes(d), _bytes(m.astype(np.float16)), _halves(q))
    wide = np.int8 if weight.bits < 8 else np.int16
    steps: Any = q.astype(wide)
    steps -= z.astype(wide)  # in place: of a large matrix each copy costs more than it computes
    if kind == "Q2_0":
        if steps.max() > 2 or steps.min() < -1:
            steps, d = -steps, -d
        return kind, _rows(_bytes(d), _quarters(_shifted(steps, 1, 3, name, kind)))
    if kind == "Q4_0":
        return kind, _rows(_bytes(d), _halves(_shifted(steps, 8, 15, name, kind)))
    return kind, _rows(_bytes(d), _shifted(steps, 128, 255, name, kind) ^ np.uint8(128))


def _shifted(steps: Steps, zero: int, top: int, name: str, kind: str) -> Bytes:
    """``steps`` from the zero of the type on, in their own memory."""
    if steps.min() < -zero or steps.max() > top - zero:
        raise PreflightError(
            f"its integers lie {steps.min()} to {steps.max()} from their zero points, "
            f"{kind} holds {-zero} to {top - zero}",
            where=name,
        )
    steps += zero
    return steps.view(np.uint8) if steps.dtype == np.int8 else steps.astype(np.uint8)


def _halves(q: Bytes) -> Bytes:
    return (q[..., :16] | (q[..., 16:] << 4)).astype(np.uint8)


def _quarters(q: Bytes) -> Bytes:
    four = q.reshape(*q.shape[:2], 16, 4)
    return (four[..., 0] | (four[..., 1] << 2) | (four[..., 2] << 4) | (four[..., 3] << 6)).astype(np.uint8)


def _bytes(numbers: NDArray[np.float16]) -> Bytes:
    return np.ascontiguousarray(numbers).view(np.uint8)


def _rows(*parts: Bytes) -> Bytes:
    blocks = np.concatenate(parts, axis=-1)
    return blocks.reshape(blocks.shape[0], -1)
