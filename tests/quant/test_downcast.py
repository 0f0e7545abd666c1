"""Every form of the downcasting operator: what it holds of a latent, and that it holds that for good."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config.grid import BITS, Grid
from engine.config.latents import Downcast, downcast_bits
from engine.quant.downcast import downcast, upcast
from engine.quant.grid import quantize

FORMS: tuple[Downcast, ...] = get_args(Downcast)
latent_numbers = st.floats(-2e4, 2e4, width=32) | st.integers(-600, 600).map(lambda n: n / 2)


@st.composite
def latents(draw: st.DrawFn) -> tuple[Tensor, Tensor, Grid]:
    """Latents of a row, with zero points, on a grid of any kind."""
    bits, group = draw(st.sampled_from(BITS)), draw(st.sampled_from((32, -1)))
    grid = Grid(bits, group, symmetric=draw(st.booleans()))
    steps = torch.tensor(draw(st.lists(latent_numbers, min_size=64, max_size=64))).reshape(1, 64)
    groups = grid.groups(64)
    whole = st.integers(0, grid.top)
    zero = torch.tensor([float(draw(whole)) for _ in range(groups)]).reshape(1, groups)
    return steps, torch.full_like(zero, grid.middle) if grid.symmetric else zero, grid


def inside(steps: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Where latents lie between the first and the last point of the grid."""
    shifted = steps.reshape(*zero.shape, -1) + zero.unsqueeze(-1)
    return ((shifted >= 0) & (shifted <= grid.top)).reshape(steps.shape)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None)
@given(given_latents=latents())
def test_what_is_kept_is_kept_for_good_and_is_off_by_no_more_than_is_said(
    form: Downcast, given_latents: tuple[Tensor, Tensor, Grid]
) -> None:
    steps, zero, grid = given_latents
    kept = downcast(steps, zero, grid, form)
    again = upcast(kept, zero, grid)
    assert again.dtype == torch.float32
    assert again.shape == steps.shape
    assert torch.equal(downcast(again, zero, grid, form), kept)
    assert kept.numel() * kept.element_size() * 8 == steps.numel() * downcast_bits(form, grid.bits)
    most = {
        "bfloat16": steps.abs() * 2.0**-8,
        "float16": steps.abs() * 2.0**-11 + 2.0**-25,
        "fixed": torch.full_like(steps, 2.0 ** -(9 - grid.bits)),
        "integer": torch.full_like(steps, 0.5),
    }[form]
    # On numbers as large as these, adding a zero point costs float32 its last bits.
    most = most + 2.0**-22 * (grid.top + 1)
    within = inside(steps, zero, grid) if form in ("fixed", "integer") else torch.ones_like(steps).bool()
    assert ((again - steps).abs() <= most)[within].all()


@settings(max_examples=15, deadline=None)
@given(latents())
def test_the_integer_form_is_rounding_to_nearest(given_latents: tuple[Tensor, Tensor, Grid]) -> None:
    steps, zero, grid = given_latents
    again = upcast(downcast(steps, zero, grid, "integer"), zero, grid)
    codes = quantize(steps, torch.ones_like(zero), zero, grid.bits).float()
    assert torch.equal(again, (codes.reshape(*zero.shape, -1) - zero.unsqueeze(-1)).reshape(steps.shape))


@pytest.mark.parametrize("bits", BITS)
def test_fixed_point_on_a_symmetric_grid_is_the_published_one(bits: int) -> None:
    grid = Grid(bits, -1, symmetric=True)
    steps = torch.randn(4, 32, generator=torch.Generator().manual_seed(bits)) * 2**bits
    zero = torch.full((4, 1), float(grid.middle))
    for row, kept in zip(steps, downcast(steps, zero, grid, "fixed"), strict=True):
        for value, number in zip(row.tolist(), kept.tolist(), strict=True):
            clipped = min(max(value, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
            assert number == round(2 ** (8 - bits) * clipped)


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_outside_of_the_grid_stays_outside_or_at_its_edge(form: Downcast) -> None:
    grid = Grid(2, -1)
    steps, zero = torch.tensor([[-1e9, -7.0, 9.0, 1e9] * 8]), torch.tensor([[1.0]])
    again = upcast(downcast(steps, zero, grid, form), zero, grid)
    assert again.isfinite().all()
    assert torch.equal(quantize(again, torch.ones(1, 1), zero, 2), quantize(steps, torch.ones(1, 1), zero, 2))
