"""The joint search of scale and zero point: against every choice there is, and its kernel against torch's
form."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import joint_search
from engine.config.grid import Grid
from engine.quant import range_search
from engine.quant.grid import SMALLEST_SCALE, dequantize, initial_range, quantize
from engine.quant.range_search import channel_weights, search_range

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel's module. Triton's interpreter takes a millisecond for each thing that is tried, and as long
    for many values as for few: where it runs, fewer scales are tried by more values a program."""
    kernel = pytest.importorskip("engine.quant.range_kernel")
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernel, "HELD_VALUES", 1 << 12)
        monkeypatch.setattr(range_search, "COARSE", 12)
        monkeypatch.setattr(range_search, "FINE", 5)
    return kernel


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def uneven(inputs: int) -> Tensor:
    return channel_weights(drawn(inputs, seed=5).abs() ** 4)


def error(weight: Tensor, found: tuple[Tensor, Tensor], bits: int, channels: Tensor) -> Tensor:
    """Weighted error of each group."""
    scale, zero = found
    made = dequantize(quantize(weight, scale, zero, bits), scale, zero)
    return ((made - weight).square() * channels).reshape(*scale.shape, -1).sum(-1)


@pytest.mark.parametrize(("zero", "turns"), [(None, False), (1, False), (2, False), (1, True), (2, True)])
def test_no_choice_of_scale_and_zero_point_is_much_better(zero: int | None, turns: bool) -> None:
    weight, channels = drawn(24, 32), uneven(32)
    grid = Grid(2, 32, fixed_zero_point=zero, turns=turns)
    span = initial_range(weight, replace(grid, turns=False))[0]
    least = torch.full_like(span, torch.inf)
    allowed = range(4) if zero is None else (zero,)
    sides = (1, -1) if turns else (1,)
    for fraction, tried, side in itertools.product(torch.linspace(0.05, 1, 2000), allowed, sides):
        pair = side * span * fraction, torch.full_like(span, float(tried))
        least = torch.minimum(least, error(weight, pair, 2, channels))
    found = search_range(weight, grid, channels)
    assert set(found[1].unique().tolist()) <= set(allowed)
    assert {1.0} < set(found[0].sign().unique().tolist()) if turns else (found[0] > 0).all()
    assert (error(weight, found, 2, channels) <= least * 1.01).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_lowers_what_it_weighs(bits: int) -> None:
    weight, channels, even = drawn(16, 128), uneven(128), torch.ones(128, device=DEVICE)
    grid = Grid(bits, 64)

    def total(found: tuple[Tensor, Tensor], of: Tensor) -> float:
        return error(weight, found, bits, of).sum().item()

    shrunken = initial_range(weight, grid, method="search", norm=2.0)
    joint, unweighted = search_range(weight, grid, channels), search_range(weight, grid)
    assert total(joint, channels) < total(shrunken, channels)
    assert total(unweighted, even) < total(shrunken, even)
    assert total(unweighted, even) < total(joint, even)
    assert torch.equal(joint[1], joint[1].round().clamp(0, grid.top))


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize(
    ("grid", "zero"),
    [
        (Grid(2, 32, fixed_zero_point=1), 1),
        (Grid(2, 32, symmetric=True), 2),
        (Grid(4, 64, symmetric=True), 8),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_what_is_fixed_stays_fixed(grid: Grid, zero: int, kernel: bool) -> None:
    scale, found = search_range(drawn(4, 64) + 0.3, grid, uneven(64), kernel=kernel)
    assert (found == zero).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("grid", [Grid(2, 32), Grid(2, 32, symmetric=True), Grid(8, -1)])
@pytest.mark.usefixtures("interpreted")
def test_groups_of_nothing_have_a_scale(grid: Grid, kernel: bool) -> None:
    weight = drawn(3, 64)
    weight[:2] = 0
    weight[1] = 1e-9
    scale, zero = search_range(weight, grid, uneven(64), kernel=kernel)
    assert (scale >= SMALLEST_SCALE).all()
    assert scale.isfinite().all()
    assert torch.equal(zero, zero.round().clamp(0, grid.top))
    made = dequantize(quantize(weight, scale, zero, grid.bits), scale, zero)
    assert (made[0] == 0).all()


def test_channels_count_neither_nothing_nor_everything() -> None:
    weights = channel_weights(torch.tensor([0.0, 1.0, 1e9, *[1.0] * 997]))
    assert weights.min() == pytest.approx(0.01)
    assert weights.max() == 100
    assert torch.equal(channel_weights(torch.zeros(4)), torch.ones(4))


@pytest.mark.parametrize("sums", [[torch.inf, 1.0, 3.0, 0.0], [torch.nan, 1.0, 3.0, 0.0], [torch.nan] * 4])
def test_channels_whose_sum_is_not_finite_leave_the_others_what_they_count(sums: list[float]) -> None:
    weights = channel_weights(torch.tensor(sums))
    assert weights[0] == 100
    assert weights.isfinite().all()
    if sums[1] == 1.0:
        assert torch.equal(weights[1:], channel_weights(torch.tensor(sums[1:])))
    else:
        assert torch.equal(weights, torch.full((4,), 100.0))


@pytest.mark.parametrize(("values", "kernel"), [(1, False), (768, False), (2 * 3 * 96, False), (500, True)])
@pytest.mark.usefixtures("interpreted")
def test_parts_are_found_like_the_whole(values: int, kernel: bool) -> None:
    weight, channels, grid = drawn(8, 96), uneven(96), Grid(3, -1)
    polled: list[int] = []
    whole = search_range(weight, grid, channels, kernel=kernel)
    parts = search_range(weight, grid, channels, kernel=kernel, values=values, poll=lambda: polled.append(0))
    assert len(polled) > 1
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


ODD = [
    (Grid(2, 32), 7, 96),
    (Grid(3, 64), 10, 320),
    (Grid(2, -1), 5, 192),
    (Grid(4, -1), 1, 33),
    (Grid(8, 32), 3, 64),
    (Grid(3, 64, symmetric=True), 9, 192),
    (Grid(2, 32, fixed_zero_point=1), 11, 32),
    (Grid(2, 32, fixed_zero_point=1, turns=True), 11, 96),
    (Grid(4, 64, symmetric=True, turns=True), 5, 128),
]


@pytest.mark.parametrize("case", range(len(ODD)))
@pytest.mark.usefixtures("interpreted")
def test_the_kernel_finds_what_torchs_form_finds(case: int) -> None:
    grid, outputs, inputs = ODD[case]
    weight, channels = drawn(outputs, inputs, seed=100 + case) * 0.02 + 0.005, uneven(inputs)
    plain = error(weight, search_range(weight, grid, channels), grid.bits, channels)
    fast = error(weight, search_range(weight, grid, channels, kernel=True), grid.bits, channels)
    assert torch.allclose(plain, fast, rtol=1e-4)


@pytest.mark.parametrize(("bits", "fixed", "most"), [(2, 1, 1.01), (3, 4, 1.04), (4, 8, 1.13)])
def test_groups_that_may_turn_round_hardly_need_zero_points_of_their_own(
    bits: int, fixed: int, most: float
) -> None:
    weight = drawn(64, 512) + 0.02 * drawn(64, 512, seed=1) ** 3
    even = torch.ones(512, device=DEVICE)

    def total(grid: Grid) -> float:
        return error(weight, search_range(weight, grid), bits, even).sum().item()

    learned, turning = total(Grid(bits, 64)), total(Grid(bits, 64, fixed_zero_point=fixed, turns=True))
    assert turning < most * learned
    assert total(Grid(bits, 64, fixed_zero_point=fixed)) > 1.1 * turning


def test_groups_that_no_program_can_hold_take_torchs_form(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []
    real = interpreted.search
    monkeypatch.setattr(interpreted, "search", lambda *given: launched.append(1) or real(*given))
    weight = drawn(2, 544)
    for one, other in zip(
        search_range(weight, Grid(2, -1)), search_range(weight, Grid(2, -1), kernel=True), strict=True
    ):
        assert torch.equal(one, other)
    assert not launched
    search_range(weight, Grid(2, 32), kernel=True)
    assert launched


def test_the_plan_counts_as_many_pairs_as_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0
    real = torch.clamp

    def counting(*given: Any, **named: Any) -> Tensor:
        nonlocal tried
        tried += 1
        return real(*given, **named)

    monkeypatch.setattr(torch, "clamp", counting)
    for grid in (Grid(2, 32), Grid(4, 32), Grid(8, 32), Grid(3, 32, symmetric=True)):
        tried = 0
        search_range(drawn(2, 32), grid)
        assert tried == joint_search.candidates(grid)
