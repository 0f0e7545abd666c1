"""Dense little-endian bit packing of small integers into 32-bit words.

Element ``j`` of a row occupies bits ``[bits*j, bits*j + bits)`` of the row's bit stream, and word ``k`` holds
bits ``[32k, 32k + 32)``. At 2, 4 and 8 bits that is the familiar "32/bits values a word, first value in the
low bits"; at 3 bits, 32 values fill exactly 3 words and two of them straddle a word border. GPTQ,
compressed-tensors and MLX files all use this stream and differ only in the axis it runs along.

Because the stream is little-endian all the way down, it can be built byte by byte: the smallest whole number
of values that fills whole bytes is 4 values a byte at 2 bits, 8 values in 3 bytes at 3 bits, 2 a byte at 4
bits. Working on bytes keeps every temporary small, which is what makes unpacking cheap enough to do in each
forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

# bits -> (values, bytes) of the smallest unit that fills whole bytes.
_UNIT = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}


def packed_length(length: int, bits: int) -> int:
    """Number of 32-bit words that ``length`` values need.

    Raises:
        ValueError: if ``bits`` is not 2, 3, 4 or 8, or the values do not fill whole words.
    """
    if bits not in _UNIT:
        raise ValueError(f"bits must be one of {sorted(_UNIT)}, not {bits}")
    if length * bits % 32:
        raise ValueError(f"{length} values of {bits} bits do not fill whole 32-bit words")
    return length * bits // 32


def bitpack(values: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack integers in ``[0, 2**bits)`` along ``dim`` into int32 words (the bits of a uint32).

    ``values`` may have any integer dtype; its size along ``dim`` times ``bits`` must be a multiple of 32.
    Returns int32 with that dimension shortened to ``size * bits // 32``.
    """
    moved = values.movedim(dim, -1)
    packed_length(moved.shape[-1], bits)
    per_unit, unit_bytes = _UNIT[bits]
    units = moved.to(torch.int32).reshape(*moved.shape[:-1], -1, per_unit)
    shifts = torch.arange(per_unit, dtype=torch.int32, device=values.device) * bits
    # Fields do not overlap, so their sum is their union.
    joined = (units << shifts).sum(-1, dtype=torch.int32)
    byte_shifts = torch.arange(unit_bytes, dtype=torch.int32, device=values.device) * 8
    stream = ((joined.unsqueeze(-1) >> byte_shifts) & 0xFF).to(torch.uint8)
    stream = stream.reshape(*moved.shape[:-1], -1).contiguous()
    return stream.view(torch.int32).movedim(-1, dim).contiguous()


def bitunpack(words: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Inverse of :func:`bitpack`: int32 words to uint8 values, ``32 // bits`` times as many along ``dim``."""
    moved = words.movedim(dim, -1).contiguous()
    per_unit, unit_bytes = _UNIT[bits]
    stream = moved.view(torch.uint8)
    if unit_bytes == 1:
        units = stream.unsqueeze(-1)
        shifts = torch.arange(per_unit, dtype=torch.uint8, device=words.device) * bits
    else:
        parts = stream.reshape(*stream.shape[:-1], -1, unit_bytes).to(torch.int32)
        units = (parts[..., 0] | (parts[..., 1] << 8) | (parts[..., 2] << 16)).unsqueeze(-1)
        shifts = torch.arange(per_unit, dtype=torch.int32, device=words.device) * bits
    values = ((units >> shifts) & ((1 << bits) - 1)).to(torch.uint8)
    return values.reshape(*stream.shape[:-1], -1).movedim(-1, dim).contiguous()
