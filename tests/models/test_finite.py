"""Weights that are no numbers are found wherever they are, of every type and shape."""

from __future__ import annotations

import pytest
import torch

from engine.models.finite import finite

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_one_number_that_is_none_is_found_anywhere(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    assert finite(tensor)
    for place in range(size):
        for odd in ("nan", "inf", "-inf"):
            tensor[place], before = float(odd), tensor[place].clone()
            assert not finite(tensor), (place, odd)
            tensor[place] = before
    assert finite(tensor)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_largest_numbers_are_numbers(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    assert finite(torch.tensor([most, -most, 0.0], dtype=dtype))


def test_numbers_of_other_shapes() -> None:
    assert finite(torch.empty(0))
    assert finite(torch.tensor(1.0))
    assert not finite(torch.tensor(float("nan")))
    tensor = torch.zeros(6, 4, 5)
    tensor[5, 3, 4] = float("inf")
    assert not finite(tensor.transpose(0, 2))
    assert not finite(torch.tensor([float("inf"), float("-inf")]))
