"""The grid's mathematics against plain loops, closed formulas and finite differences."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import pytest
import torch
from torch import Tensor

from engine.config.grid import Grid, held_zero_point
from engine.config.range_steps import tried_ranges
from engine.quant import grid as quant_grid
from engine.quant.grid import dequantize, fake_quantize, fake_quantize_steps, initial_range, quantize

BITS = [2, 3, 4, 8]
GROUPS = [32, 64, 128, 256, -1]


def random_case(
    bits: int, group: int, out: int = 5, inputs: int = 256, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights with some clamped on both sides, and zero points at both ends of their range."""
    gen = torch.Generator().manual_seed(seed)
    groups = Grid(bits, group).groups(inputs)
    weight = torch.randn(out, inputs, generator=gen, dtype=torch.float64)
    scale = (torch.rand(out, groups, generator=gen, dtype=torch.float64) + 0.2) * 3 / 2**bits
    zero = torch.randint(0, 2**bits, (out, groups), generator=gen).double()
    zero.view(-1)[0], zero.view(-1)[-1] = 0, 2**bits - 1
    return weight, scale, zero


def loop_quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> list[list[int]]:
    group = weight.shape[1] // scale.shape[1]
    return [
        [
            max(0, min(2**bits - 1, round(w / scale[o, i // group].item()) + int(zero[o, i // group])))
            for i, w in enumerate(row)
        ]
        for o, row in enumerate(weight.tolist())
    ]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_quantize_and_dequantize_match_plain_loops(bits: int, group: int) -> None:
    weight, scale, zero = random_case(bits, group)
    codes = quantize(weight, scale, zero, bits)
    expected = loop_quantize(weight, scale, zero, bits)
    assert codes.tolist() == expected
    size = weight.shape[1] // scale.shape[1]
    plain = [
        [(q - zero[o, i // size].item()) * scale[o, i // size].item() for i, q in enumerate(row)]
        for o, row in enumerate(expected)
    ]
    assert torch.equal(dequantize(codes, scale, zero), torch.tensor(plain, dtype=torch.float64))
    assert torch.equal(fake_quantize(weight, scale, zero, bits), dequantize(codes, scale, zero))


def reference_gradients(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three formulas of the grid, element by element."""
    size = weight.shape[1] // scale.shape[1]
    s = scale.repeat_interleave(size, 1)
    z = zero.repeat_interleave(size, 1)
    unclamped = torch.round(weight / s) + z
    inside = (unclamped >= 0) & (unclamped <= 2**bits - 1)
    q = unclamped.clamp(0, 2**bits - 1)
    grad_w = torch.where(inside, upstream, 0.0)
    grad_s = upstream * torch.where(inside, (q - z) - weight / s, q - z)
    grad_z = upstream * torch.where(inside, 0.0, -s)
    per_group = (weight.shape[0], scale.shape[1], size)
    return grad_w, grad_s.reshape(per_group).sum(-1), grad_z.reshape(per_group).sum(-1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_gradients_are_those_of_the_method(bits: int, group: int) -> None:
    weight, scale, zero = random_case(bits, group, seed=bits)
    leaves = [t.clone().requires_grad_(True) for t in (weight, scale, zero)]
    upstream = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fake_quantize(*leaves, bits).backward(upstream)
    for leaf, expected in zip(leaves, reference_gradients(weight, scale, zero, bits, upstream), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-10, atol=1e-10)


def test_gradients_match_finite_differences_where_the_function_is_smooth() -> None:
    """With rounding replaced by the identity, straight-through gradients are true ones; elsewhere,
    the scale's true derivative is q - z, and the clamped part of the zero point's is exact."""
    bits, eps = 3, 1e-6
    weight, scale, zero = random_case(bits, 64, seed=3)
    upstream = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def smooth(w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        ws, zs = s.repeat_interleave(64, 1), z.repeat_interleave(64, 1)
        # The rounding error is frozen: what straight-through rounding means.
        error = torch.round(weight / scale.repeat_interleave(64, 1)) - weight / scale.repeat_interleave(64, 1)
        q = (w / ws + error + zs).clamp(0, 2**bits - 1)
        return ((q - zs) * ws * upstream).sum()

    leaves = [t.clone().requires_grad_(True) for t in (weight, scale, zero)]
    fake_quantize(*leaves, bits).backward(upstream)
    # Integers exactly at the clamp's edge have no two-sided derivative.
    unclamped = torch.round(weight / scale.repeat_interleave(64, 1)) + zero.repeat_interleave(64, 1)
    edge_groups = ((unclamped == 0) | (unclamped == 2**bits - 1)).reshape(5, -1, 64).any(-1)
    for position, leaf in enumerate(leaves):
        assert leaf.grad is not None
        checked = 0
        for index in range(0, leaf.numel(), 7 if position == 0 else 1):
            o, i = divmod(index, leaf.shape[1])
            if (position == 0 and unclamped[o, i] in (0, 2**bits - 1)) or (position and edge_groups[o, i]):
                continue
            values = []
            for sign in (1, -1):
                moved = [t.clone() for t in (weight, scale, zero)]
                moved[position][o, i] += sign * eps
                values.append(smooth(*moved).item())
            numeric = (values[0] - values[1]) / (2 * eps)
            assert math.isclose(leaf.grad[o, i].item(), numeric, rel_tol=1e-5, abs_tol=1e-6)
            checked += 1
        assert checked or position, "no weight was checked"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, -1])
def test_gradients_of_weights_counted_in_grid_steps_are_finite_differences(bits: int, group: int) -> None:
    """Of the grid without its rounding for weights and zero points, which is what straight-through means; of
    the grid itself for scales, which have no rounding in their way."""
    weight, scale, zero = random_case(bits, group, inputs=64, seed=bits)
    size = 64 // scale.shape[1]
    steps = weight / scale.repeat_interleave(size, 1)
    upstream = torch.randn(steps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss(steps: Tensor, scale: Tensor, zero: Tensor, rounds: bool) -> float:
        wider = 0.0 if rounds else 0.5  # what is rounded to the last integer is not clamped
        s, z = (each.repeat_interleave(size, 1) for each in (scale, zero))
        q = ((steps.round() if rounds else steps) + z).clamp(-wider, 2**bits - 1 + wider)
        return float(((q - z) * s * upstream).sum())

    values = steps, scale, zero
    leaves = [value.clone().requires_grad_(True) for value in values]
    out = fake_quantize_steps(*leaves, bits)
    integers = loop_quantize(steps, torch.ones_like(scale), zero, bits)
    assert torch.equal(out, dequantize(torch.tensor(integers), scale, zero))
    out.backward(upstream)
    for position, leaf in enumerate(leaves):
        assert leaf.grad is not None
        assert leaf.grad.any()
        for index in range(0, leaf.numel(), 7 if position == 0 else 1):
            sides = []
            for sign in (1, -1):
                moved = [value.clone() for value in values]
                moved[position].view(-1)[index] += sign * 1e-6
                sides.append(loss(*moved, rounds=position == 1))
            numeric = (sides[0] - sides[1]) / 2e-6
            assert leaf.grad.view(-1)[index].item() == pytest.approx(numeric, rel=1e-5, abs=1e-6)


def test_scale_gradient_matches_finite_differences_without_edges() -> None:
    """A grid wide enough that nothing is clamped: every scale's derivative can be checked."""
    gen = torch.Generator().manual_seed(5)
    weight = torch.randn(3, 64, generator=gen, dtype=torch.float64).clamp(-3, 3)
    scale = torch.full((3, 2), 0.05, dtype=torch.float64, requires_grad=True)
    zero = torch.full((3, 2), 128.0, dtype=torch.float64)
    fake_quantize(weight, scale, zero, 8).sum().backward()
    error = torch.round(weight / 0.05) - weight / 0.05
    # d/ds of (w/s + error) * s at frozen error is the error itself.
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, error.reshape(3, 2, 32).sum(-1))


def test_zero_point_out_of_range_is_clamped_and_gets_no_gradient() -> None:
    weight = torch.randn(2, 64, dtype=torch.float64)
    scale = torch.full((2, 1), 0.3, dtype=torch.float64)
    zero = torch.tensor([[-2.0], [9.4]], dtype=torch.float64, requires_grad=True)
    out = fake_quantize(weight, scale, zero, 2)
    assert torch.equal(out, fake_quantize(weight, scale, torch.tensor([[0.0], [3.0]]).double(), 2))
    out.sum().backward()
    assert zero.grad is not None
    assert torch.equal(zero.grad, torch.zeros_like(zero))


@pytest.mark.parametrize("bits", BITS)
def test_minmax_range_covers_the_group_and_holds_zero(bits: int) -> None:
    weight = torch.randn(7, 128, generator=torch.Generator().manual_seed(bits)) + 0.4
    scale, zero = initial_range(weight, Grid(bits, 32))
    assert torch.equal(zero, zero.round())
    assert zero.min() >= 0
    assert zero.max() <= 2**bits - 1
    error = (fake_quantize(weight, scale, zero, bits) - weight).abs()
    # Rounding z moves the grid by up to half a step on top of half a step of rounding.
    assert (error <= scale.repeat_interleave(32, 1) * 1.001).all()
    zeros = fake_quantize(torch.zeros_like(weight), scale, zero, bits)
    assert torch.equal(zeros, torch.zeros_like(zeros))


NORMS = (2.0, 2.4, 2.5, 3.0, 3.5, 4.0, 5.0)
"""The default, and those that LR-QAT was published with."""


HEAVY = torch.randn(48, 128, generator=torch.Generator().manual_seed(7)) ** 3
"""Weights with a few large ones in each group."""


@cache
def searched(grid: Grid, norm: float) -> tuple[Tensor, Tensor]:
    return initial_range(HEAVY, grid, method="search", norm=norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_searched_range_wins_in_its_own_norm(bits: int, group: int, symmetric: bool, norm: float) -> None:
    """Against the whole span, and against what is found in any other norm: these are other ranges."""
    grid = Grid(bits, group, symmetric)

    def errors(found: tuple[Tensor, Tensor]) -> Tensor:
        """Of each group."""
        off = (fake_quantize(HEAVY, *found, bits) - HEAVY).abs().double()
        return off.pow(norm).reshape(48, grid.groups(128), -1).sum(-1)

    own = errors(searched(grid, norm))
    span = errors(initial_range(HEAVY, grid, method="minmax"))
    assert (own <= span * 1.0001).all()
    assert own.sum() < 0.99 * span.sum()
    for other in set(NORMS) - {norm}:
        theirs = errors(searched(grid, other))
        assert (own <= theirs * 1.0001).all(), other
        assert (own < theirs * 0.999).any(), other


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("held", [None, "one way", "both ways"])
def test_as_many_ranges_are_tried_as_the_plan_counts(
    bits: int, held: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is measured once."""
    fixed = None if held is None else held_zero_point(bits)
    grid = Grid(bits, 32, fixed_zero_point=fixed, turns=held == "both ways")
    measured: list[Tensor] = []
    power = quant_grid._power

    def counted(error: Tensor, norm: float) -> Tensor:
        measured.append(error)
        return power(error, norm)

    monkeypatch.setattr(quant_grid, "_power", counted)
    initial_range(torch.randn(4, 64), grid, method="search")
    assert len(measured) == tried_ranges(grid)
    assert len(measured) == (64 if bits == 2 and held is None else 30 if grid.turns else 15)


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_grid_has_its_zero_point_in_the_middle(bits: int) -> None:
    weight = torch.randn(4, 64)
    _, zero = initial_range(weight, Grid(bits, 32, symmetric=True), method="search")
    assert zero.unique().tolist() == [2 ** (bits - 1)]


FIXED = [(2, 1), (2, 2), (3, 4), (4, 8), (8, 128), (4, 3), (8, 1)]


@pytest.mark.parametrize("method", ["minmax", "search"])
@pytest.mark.parametrize(("bits", "fixed"), FIXED)
def test_where_the_zero_point_is_fixed_only_the_scale_is_chosen(
    bits: int, fixed: int, method: Literal["minmax", "search"]
) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(bits)) ** 3
    weight[0] = weight[0].abs()  # groups that lie on one side of zero
    weight[1] = -weight[1].abs()
    grid = Grid(bits, 32, fixed_zero_point=fixed)
    scale, zero = initial_range(weight, grid, method=method, norm=2.5)
    assert zero.unique().tolist() == [fixed]
    assert (scale > 0).all()
    codes = quantize(weight, scale, zero, bits)
    assert torch.equal(dequantize(codes, scale, zero), fake_quantize(weight, scale, zero, bits))
    if method == "minmax":  # no weight lies beyond the grid's ends
        steps = weight.reshape(7, 3, 32) / scale.unsqueeze(-1)
        assert steps.min() >= -fixed - 1e-4
        assert steps.max() <= grid.top - fixed + 1e-4
    else:  # no other fraction of the span that is tried does better
        span = initial_range(weight, grid, method="minmax")[0]

        def error(scale: torch.Tensor) -> torch.Tensor:
            off = (fake_quantize(weight, scale, zero, bits) - weight).abs() ** 2.5
            return off.reshape(7, 3, 32).sum(-1)

        least = 0.3 if bits <= 3 else 0.6
        for step in range(15):
            assert (error(scale) <= error(span * (1 - (1 - least) * step / 14)) * 1.0001).all()


@pytest.mark.parametrize("method", ["minmax", "search"])
@pytest.mark.parametrize(("bits", "fixed"), FIXED[:5])
def test_a_group_turns_round_where_that_fits_it_better(
    bits: int, fixed: int, method: Literal["minmax", "search"]
) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(bits)) ** 3
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    one_way = Grid(bits, 32, fixed_zero_point=fixed)
    turning = Grid(bits, 32, fixed_zero_point=fixed, turns=True)
    assert turning == one_way, "where groups begin is not what a grid is"

    def error(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return ((fake_quantize(weight, *found, bits) - weight).abs() ** 2.5).reshape(7, 3, 32).sum(-1)

    found = initial_range(weight, turning, method=method, norm=2.5)
    assert found[1].unique().tolist() == [fixed]
    assert {-1.0, 1.0} == set(found[0].sign().unique().tolist())
    ahead = initial_range(weight, one_way, method=method, norm=2.5)
    back = initial_range(-weight, one_way, method=method, norm=2.5)
    back = -back[0], back[1]
    if method == "minmax":
        assert torch.equal(found[0].abs(), torch.minimum(ahead[0], -back[0]))
        steps = weight.reshape(7, 3, 32) / found[0].unsqueeze(-1)
        assert steps.min() >= -fixed - 1e-4
        assert steps.max() <= turning.top - fixed + 1e-4
    else:
        assert torch.allclose(error(found), torch.minimum(error(ahead), error(back)), rtol=1e-5)


@pytest.mark.parametrize(("bits", "fixed"), [(4, 3), (8, 1), (3, None)])
def test_groups_turn_round_about_the_middle_alone(bits: int, fixed: int | None) -> None:
    with pytest.raises(ValueError, match="do not turn round"):
        Grid(bits, 32, fixed_zero_point=fixed, turns=True)


@pytest.mark.parametrize("bits", BITS)
def test_fixed_in_the_middle_is_the_symmetric_grid(bits: int) -> None:
    middle = Grid(bits, 32, fixed_zero_point=2 ** (bits - 1))
    assert middle == Grid(bits, 32, symmetric=True)
    assert middle.symmetric
    assert Grid(bits, 32).fixed_zero_point is None
    assert not Grid(bits, 32, fixed_zero_point=1).symmetric


@pytest.mark.parametrize(("symmetric", "fixed"), [(True, 1), (False, 0), (False, 3), (False, -1)])
def test_a_zero_point_that_leaves_a_side_empty_or_contradicts_is_refused(symmetric: bool, fixed: int) -> None:
    with pytest.raises(ValueError, match="zero point"):
        Grid(2, 32, symmetric, fixed)


def test_all_zero_and_tiny_weights_stay_finite_and_keep_their_precision() -> None:
    zeros = torch.zeros(2, 64)
    scale, zero = initial_range(zeros, Grid(2, 32))
    assert torch.isfinite(scale).all()
    assert torch.equal(fake_quantize(zeros, scale, zero, 2), zeros)
    tiny = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 1e-4
    scale, zero = initial_range(tiny, Grid(8, 32))
    # An absolute floor of 1e-4 on the scale would round all of these to zero.
    assert ((fake_quantize(tiny, scale, zero, 8) - tiny).abs() <= scale.repeat_interleave(32, 1)).all()
    assert scale.max() < 1e-5


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="64 does not divide 172"):
        Grid(4, 64).groups(172)
