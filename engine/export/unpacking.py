"""Integers out of 32-bit words, for the readers of packed files; shares nothing with what packs them.

Most files hold a little-endian bit stream without a gap, in which integers of 3 bits straddle words. Some
hold as many whole integers a word as it has room for, ten of 3 bits, and leave the upper bits of a word
unused: EfficientQAT's, and those of compressed-tensors before 0.18. At 2, 4 and 8 bits the two are one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK_VALUES = 1 << 24  # values unpacked at once; each costs `bits` bytes while its bits are apart


def as_words(words: NDArray[Any]) -> NDArray[np.uint32]:
    """The same words without a sign.

    Raises:
        TypeError: for numbers of another type, which hold no packed integers.
    """
    if words.dtype not in (np.int32, np.uint32):
        raise TypeError(f"words of type {words.dtype} hold no integers")
    return np.ascontiguousarray(words).view(np.uint32)


def unpack_rows(words_RK: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Read each row of words as a little-endian stream of ``bits``-wide integers: ``[R, K*32/bits]``.

    Element ``j`` occupies bits ``[bits*j, bits*j + bits)`` and word ``k`` holds bits ``[32k, 32k + 32)``; at
    3 bits elements straddle words.
    """
    rows, words = words_RK.shape
    length = words * 32 // bits
    out = np.empty((rows, length), dtype=np.uint8)
    step = max(1, _CHUNK_VALUES // max(1, length))
    for start in range(0, rows, step):
        part = as_words(words_RK[start : start + step]).astype("<u4", copy=False)
        octets = part.view(np.uint8)
        if 8 % bits == 0:  # whole integers a byte: no bit need be taken apart
            whole = out[start : start + step].reshape(*octets.shape, 8 // bits)
            for number in range(8 // bits):
                whole[:, :, number] = (octets >> (bits * number)) & (2**bits - 1)
            continue
        stream = np.unpackbits(octets, axis=1, bitorder="little")
        fields = stream[:, : length * bits].reshape(len(part), length, bits)
        value = np.zeros((len(part), length), dtype=np.uint8)
        for position in range(bits):
            value |= fields[:, :, position] << position
        out[start : start + step] = value
    return out


def unpack_whole(words_RK: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Read each word as ``32 // bits`` integers, the first in its low bits: ``[R, K*(32//bits)]``."""
    words = as_words(words_RK)
    fields = [(words >> np.uint32(bits * place)) & np.uint32(2**bits - 1) for place in range(32 // bits)]
    return np.stack(fields, axis=2).astype(np.uint8).reshape(len(words), -1)


def words_of(length: int, bits: int) -> tuple[int, int]:
    """How many words hold so many integers without a gap, and with whole integers a word."""
    return -(-length * bits // 32), -(-length // (32 // bits))


def unpack_values(words_RK: NDArray[np.int32], bits: int, length: int) -> NDArray[np.uint8]:
    """The first ``length`` integers of each row, whichever way it is packed: ``[R, length]``.

    Raises:
        ValueError: where a row has another number of words than so many integers fill.
    """
    dense, whole = words_of(length, bits)
    if words_RK.shape[1] == dense:
        return unpack_rows(words_RK, bits)[:, :length]
    if words_RK.shape[1] == whole:
        return unpack_whole(words_RK, bits)[:, :length]
    raise ValueError(f"{words_RK.shape[1]} words do not hold {length} integers of {bits} bits")
