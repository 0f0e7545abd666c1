"""The joint search of scale and zero point: against every choice there is, and its kernel against its plain
form."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from engine.config.grid import Grid
from engine.quant import range_search
from engine.quant.grid import SMALLEST_SCALE, dequantize, initial_range, quantize
from engine.quant.range_search import channel_weights, search_range

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def uneven(inputs: int) -> Tensor:
    return channel_weights(drawn(inputs, seed=5).abs() ** 4)


def error(weight: Tensor, found: tuple[Tensor, Tensor], bits: int, channels: Tensor, power: float) -> Tensor:
    """Weighted error of each group."""
    scale, zero = found
    made = dequantize(quantize(weight, scale, zero, bits), scale, zero)
    return ((made - weight).abs() ** power * channels).reshape(*scale.shape, -1).sum(-1)


def test_no_choice_of_scale_and_zero_point_is_much_better() -> None:
    weight, channels, bits = drawn(6, 32), uneven(32), 2
    span = initial_range(weight, Grid(bits, 32))[0]
    least = torch.full_like(span, torch.inf)
    for fraction, zero in itertools.product(torch.linspace(0.05, 1, 2000), range(4)):
        tried = span * fraction, torch.full_like(span, float(zero))
        least = torch.minimum(least, error(weight, tried, bits, channels, 2.0))
    found = error(weight, search_range(weight, Grid(bits, 32), channels), bits, channels, 2.0)
    assert (found <= least * 1.01).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("power", [2.0, 2.4])
def test_it_lowers_what_it_weighs(bits: int, power: float) -> None:
    weight, channels, even = drawn(16, 128), uneven(128), torch.ones(128, device=DEVICE)
    grid = Grid(bits, 64)

    def total(found: tuple[Tensor, Tensor], of: Tensor) -> float:
        return error(weight, found, bits, of, power).sum().item()

    shrunken = initial_range(weight, grid, method="search", norm=power)
    joint = search_range(weight, grid, channels, power=power)
    clipped = search_range(weight, grid, channels, power=power, joint=False)
    unweighted = search_range(weight, grid, power=power)
    assert total(joint, channels) < total(clipped, channels) < total(shrunken, channels)
    assert total(unweighted, even) < total(shrunken, even)
    assert total(unweighted, even) < total(joint, even)
    assert torch.equal(joint[1], joint[1].round().clamp(0, grid.top))


def test_what_is_fixed_stays_fixed() -> None:
    grid = Grid(2, 32, fixed_zero_point=1)
    scale, zero = search_range(drawn(4, 64), grid, uneven(64))
    assert (zero == 1).all()
    assert (scale > 0).all()


def test_groups_of_nothing_have_a_scale() -> None:
    scale, zero = search_range(torch.zeros(3, 64, device=DEVICE), Grid(2, 32))
    assert (scale >= SMALLEST_SCALE).all()
    assert torch.isfinite(zero).all()


def test_channels_count_neither_nothing_nor_everything() -> None:
    weights = channel_weights(torch.tensor([0.0, 1.0, 1e9, *[1.0] * 997]))
    assert weights.min() == pytest.approx(0.01)
    assert weights.max() == 100
    assert torch.equal(channel_weights(torch.zeros(4)), torch.ones(4))


@pytest.mark.parametrize("rows_at_a_time", [1, 3])
def test_parts_are_found_like_the_whole(rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, channels, grid = drawn(8, 96), uneven(96), Grid(3, -1)
    whole = range_search._search(*arguments(weight, grid, channels))
    monkeypatch.setattr(range_search, "VALUES_AT_A_TIME", rows_at_a_time * 8 * 96 * 7)
    for one, other in zip(whole, range_search._search(*arguments(weight, grid, channels)), strict=True):
        assert torch.equal(one, other)


def arguments(weight: Tensor, grid: Grid, channels: Tensor, power: float = 2.0) -> tuple:  # type: ignore[type-arg]
    """Of both forms of the search."""
    grouped = weight.reshape(len(weight), grid.groups(weight.shape[1]), -1)
    span, _ = initial_range(weight, grid)
    coarse, fine = range_search._steps(range_search.lowest_fraction(grid.bits), DEVICE)
    first, count = torch.zeros_like(span), grid.top + 1
    if grid.fixed_zero_point is not None:
        first, count = torch.full_like(span, float(grid.fixed_zero_point)), 1
    by_group = channels.reshape(grouped.shape[1:])
    return grouped, by_group, span, first, count, grid.top, power, coarse, fine


@pytest.mark.parametrize(
    ("grid", "power"), [(Grid(2, 32), 2.0), (Grid(3, 64), 2.4), (Grid(2, -1), 2.0), (Grid(3, 64, True), 2.0)]
)
def test_the_kernel_finds_what_the_plain_form_finds(
    grid: Grid, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = pytest.importorskip("engine.quant.range_kernel")
    if DEVICE.type == "cpu":  # interpreted, a program takes as long for a few values as for many
        monkeypatch.setattr(kernel, "HELD_VALUES", 1 << 12)
    weight, channels = drawn(10, 192), uneven(192)
    given = arguments(weight, grid, channels, power)
    plain, fast = (
        error(weight, form(*given), grid.bits, channels, power)
        for form in (range_search._search, kernel.search)
    )
    assert torch.allclose(plain, fast, rtol=1e-4)
