"""The bit stream of packed weights: compared with one built from Python integers, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.quant.packing import bitpack, bitunpack, packed_length


def stream_words(values: list[int], bits: int) -> list[int]:
    """Element j at bits [bits*j, bits*j + bits) of one big integer, cut into signed 32-bit words."""
    stream = sum(value << (bits * j) for j, value in enumerate(values))
    words = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(len(values) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, int, int, int]:
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    units = draw(st.integers(1, 6))
    length = units * (32 if bits == 3 else 32 // bits)
    return bits, length, draw(st.integers(1, 5)), draw(st.integers(0, 2**31))


@given(rows())
@settings(max_examples=60, deadline=None)
def test_packed_words_are_the_little_endian_bit_stream(case: tuple[int, int, int, int]) -> None:
    bits, length, count, seed = case
    values = torch.randint(0, 2**bits, (count, length), generator=torch.Generator().manual_seed(seed))
    words = bitpack(values, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [stream_words(row, bits) for row in values.tolist()]


@given(rows(), st.sampled_from([0, 1, -1]))
@settings(max_examples=60, deadline=None)
def test_unpacking_restores_every_value_along_either_dimension(
    case: tuple[int, int, int, int], dim: int
) -> None:
    bits, length, count, seed = case
    values = torch.randint(0, 2**bits, (count, length), generator=torch.Generator().manual_seed(seed))
    if dim == 0:
        values = values.t().contiguous()
    words = bitpack(values, bits, dim=dim)
    assert words.shape[dim] == packed_length(length, bits)
    assert torch.equal(bitunpack(words, bits, dim=dim), values.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("extreme", ["zeros", "top"])
def test_extreme_values_survive(bits: int, extreme: str) -> None:
    value = 0 if extreme == "zeros" else 2**bits - 1
    values = torch.full((3, 96), value, dtype=torch.uint8)
    words = bitpack(values, bits)
    assert words.unique().tolist() == [0 if extreme == "zeros" else -1]
    assert torch.equal(bitunpack(words, bits), values)


def test_three_bit_values_straddle_word_borders_as_published() -> None:
    # Value 10 has its low two bits at the top of word 0 and its high bit at the bottom of word 1.
    values = torch.zeros((1, 32), dtype=torch.uint8)
    values[0, 10] = 0b111
    values[0, 21] = 0b101
    word0, word1, word2 = (w & 0xFFFFFFFF for w in bitpack(values, 3)[0].tolist())
    assert word0 == 0b11 << 30
    assert word1 == 1 | (1 << 31)
    assert word2 == 0b10


@pytest.mark.parametrize(("length", "bits"), [(31, 2), (33, 3), (16, 3), (4, 4), (32, 5)])
def test_lengths_that_do_not_fill_words_are_refused(length: int, bits: int) -> None:
    with pytest.raises(ValueError, match=r"do not fill|bits must be"):
        bitpack(torch.zeros((2, length), dtype=torch.uint8), bits)
