"""A linear of a frozen latent and two factors: its mathematics, what it keeps, and what it becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.config.grid import Grid
from engine.config.latents import Downcast
from engine.quant.downcast import upcast
from engine.quant.fake_linear import FakeQuantLinear, steps_of
from engine.quant.low_rank import LowRank, LowRankLinear, principal_rows

FORMS: tuple[Downcast, ...] = get_args(Downcast)
GRIDS = [Grid(2, 32), Grid(3, -1), Grid(4, 32, symmetric=True), Grid(8, -1), Grid(2, 32, fixed_zero_point=1)]
OUT, IN = 24, 64


def latent_linear(grid: Grid, seed: int = 0) -> FakeQuantLinear:
    """A linear on its initial grid, counted in grid steps, latents where the weights were."""
    made = nn.Linear(IN, OUT)
    with torch.no_grad():
        made.weight.copy_(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) * 0.1)
    wrapped = FakeQuantLinear.of_linear(made, grid)
    packed = wrapped.freeze()
    return FakeQuantLinear.of_packed(packed, made.bias, steps_of(made.weight.detach(), packed.scale))


def layer(grid: Grid, how: LowRank | None = None, *, noise: float = 4.0) -> LowRankLinear:
    """One whose factors have moved so far that integers differ, and some are clamped."""
    made = LowRankLinear(latent_linear(grid), how or LowRank(rank=8), seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factor in (made.a, made.b):
            factor.copy_(torch.randn(factor.shape, generator=generator) * noise)
    for parameter in (made.a, made.b, made.scale, made.zero_point):
        parameter.requires_grad_(True)
    return made


def by_loops(made: LowRankLinear) -> tuple[list[list[int]], Tensor]:
    """Integers and weights, number by number."""
    latent = upcast(made.kept, made.origin, made.grid).tolist()
    a, b, scale, zero = (t.tolist() for t in (made.a, made.b, made.scale, made.zero_point))
    group = IN // len(scale[0])
    codes, weight = [[0] * IN for _ in range(OUT)], torch.zeros(OUT, IN)
    for row in range(OUT):
        for column in range(IN):
            product = sum(a[row][k] * b[k][column] for k in range(made.how.rank))
            z = round(zero[row][column // group])
            value = latent[row][column] + made.how.alpha / made.how.rank * product
            codes[row][column] = min(max(round(value) + z, 0), made.grid.top)
            weight[row, column] = (codes[row][column] - z) * scale[row][column // group]
    return codes, weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_forward_and_merge_are_what_loops_compute(grid: Grid, form: Downcast) -> None:
    made = layer(grid, LowRank(rank=8, alpha=2.0, form=form))
    codes, weight = by_loops(made)
    with torch.no_grad():
        eye = made(torch.eye(IN)) - made.bias
    # A sum in another order may lie on the other side of a half.
    off = ~torch.isclose(eye.t(), weight, rtol=1e-4, atol=1e-6)
    assert off.float().mean() < 0.002
    merged = made.freeze()
    assert (merged.codes() != torch.tensor(codes)).float().mean() < 0.002
    # The forward pass's own integers, without exception.
    scale = made.scale.repeat_interleave(IN // made.scale.shape[1], 1)
    zero = made.zero_point.round().repeat_interleave(IN // made.scale.shape[1], 1)
    assert torch.equal((eye.t() / scale).round() + zero, merged.codes().float())


def plain(made: LowRankLinear, x: Tensor) -> Tensor:
    """The same by operations whose gradients autograd derives; only rounding is straight-through."""
    latent = upcast(made.kept, made.origin, made.grid) + made.how.ratio * (made.a @ made.b)
    rounded = latent + (latent.round() - latent).detach()
    zero = made.zero_point + (made.zero_point.round() - made.zero_point).detach()
    zero = zero.clamp(0, made.grid.top).unsqueeze(-1)
    q = (rounded.reshape(*made.scale.shape, -1) + zero).clamp(0, made.grid.top)
    weight = ((q - zero) * made.scale.unsqueeze(-1)).flatten(1)
    return functional.linear(x, weight, made.bias)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_are_those_of_plain_operations(grid: Grid) -> None:
    made = layer(grid)
    x = torch.randn(2, 5, IN, requires_grad=True)
    weighting = torch.randn(2, 5, OUT)
    parameters = (x, made.a, made.b, made.scale, made.zero_point)
    ours = torch.autograd.grad((made(x) * weighting).sum(), parameters)
    theirs = torch.autograd.grad((plain(made, x) * weighting).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_differences_of_the_grid_without_its_rounding() -> None:
    """The loss is linear in the weight, so the gradient by a factor is that of the clamped, unrounded
    latent; scales have no rounding in their way."""
    made = layer(Grid(3, 32))
    x, weighting = torch.randn(7, IN).double(), torch.randn(7, OUT).double()
    latent = upcast(made.kept, made.origin, made.grid).double()
    zero = made.zero_point.detach().double().unsqueeze(-1)

    def loss(a: Tensor, b: Tensor, scale: Tensor, rounds: bool) -> float:
        steps = latent + made.how.ratio * (a @ b)
        steps = (steps.round() if rounds else steps).reshape(*scale.shape, -1)
        wider = 0.0 if rounds else 0.5  # what is rounded to the last integer is not clamped
        weight = ((steps + zero).clamp(-wider, made.grid.top + wider) - zero) * scale.unsqueeze(-1)
        return float((functional.linear(x, weight.flatten(1)) * weighting).sum())

    (made(x.float()) * weighting.float()).sum().backward()
    values = [p.detach().double() for p in (made.a, made.b, made.scale)]
    for index, parameter in enumerate((made.a, made.b, made.scale)):
        assert parameter.grad is not None
        for place in torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(2))[:6]:
            step = 1e-6
            sides = []
            for sign in (1, -1):
                moved = [value.clone() for value in values]
                moved[index].view(-1)[place] += sign * step
                sides.append(loss(*moved, rounds=index == 2))
            difference = (sides[0] - sides[1]) / (2 * step)
            assert parameter.grad.flatten()[place].item() == pytest.approx(difference, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_the_weights_size_outlives_the_forward_pass(form: Downcast) -> None:
    made = layer(Grid(4, 32), LowRank(rank=8, form=form))
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = made(torch.randn(3, IN, requires_grad=True))
    large = [tensor for tensor in seen if tensor.numel() >= OUT * IN]
    assert all(tensor.data_ptr() == made.kept.data_ptr() for tensor in large), [t.shape for t in large]
    out.sum().backward()
    assert made.a.grad is not None


@pytest.mark.parametrize("form", FORMS)
def test_it_begins_as_the_rounded_linear_but_for_what_the_form_loses(form: Downcast) -> None:
    grid = Grid(4, 32)
    linear = latent_linear(grid)
    packed = linear.freeze()
    made = LowRankLinear(linear, LowRank(rank=8, form=form), seed=0)
    merged = made.freeze()
    assert torch.equal(merged.scale, packed.scale)
    assert torch.equal(merged.zero_point, packed.zero_point)
    differ = merged.codes() != packed.codes()
    assert differ.float().mean() < (0.0001 if form == "integer" else 0.06)
    # Only what lay next to the border between two integers may be on its other side.
    fraction = (linear.weight.detach() - linear.weight.detach().floor() - 0.5).abs()
    assert (fraction[differ] <= 2.0**-5).all()
    codes = merged.codes().int() - packed.codes().int()
    assert codes.abs().max() <= 1


def test_scales_below_zero_are_turned_around() -> None:
    linear = latent_linear(Grid(2, 32))
    packed = linear.freeze()
    turned = replace(packed, scale=torch.where(torch.rand(packed.scale.shape) < 0.5, -1, 1) * packed.scale)
    made = LowRankLinear(FakeQuantLinear.of_packed(turned), LowRank(form="integer"), seed=0)
    assert torch.equal(made.freeze().dequantize(), turned.dequantize())


@pytest.mark.parametrize("zero_factor", ["a", "b"])
@pytest.mark.parametrize("start", ["kaiming", "svd"])
def test_one_factor_starts_at_zero_and_the_other_as_large_either_way(zero_factor: Any, start: Any) -> None:
    linear = latent_linear(Grid(4, -1))
    how = LowRank(rank=16, zero_factor=zero_factor, start=start, dtype=torch.bfloat16)
    made, again, other = (LowRankLinear(linear, how, seed) for seed in (5, 5, 6))
    zero, drawn = (made.a, made.b) if zero_factor == "a" else (made.b, made.a)
    assert not zero.any()
    assert zero.dtype == drawn.dtype == torch.bfloat16
    assert torch.equal(made.a, again.a)
    assert torch.equal(made.b, again.b)
    fan_in = IN if zero_factor == "a" else 16
    assert drawn.float().square().mean().sqrt().item() == pytest.approx((1 / (3 * fan_in)) ** 0.5, rel=0.1)
    if start == "kaiming":
        assert not torch.equal(drawn, other.b if zero_factor == "a" else other.a)


def test_singular_vectors_are_those_of_a_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 40, generator=generator)).Q for n in (48, 80))
    matrix = left @ torch.diag(0.7 ** torch.arange(40.0)) @ right.t()
    rows = principal_rows(matrix, 6, torch.Generator().manual_seed(1))
    _, _, wanted = torch.linalg.svd(matrix, full_matrices=False)
    overlap = (rows @ wanted[:6].t()).abs()
    torch.testing.assert_close(overlap, torch.eye(6), atol=2e-2, rtol=0)
    few = principal_rows(torch.randn(3, 20, generator=generator), 8, generator)
    assert few.shape == (3, 20)


def test_a_rank_above_the_linears_own_is_no_obstacle() -> None:
    for zero_factor in ("a", "b"):
        how = LowRank(rank=100, zero_factor=zero_factor, start="svd")  # type: ignore[arg-type]
        made = LowRankLinear(latent_linear(Grid(4, -1)), how, seed=0)
        assert torch.isfinite(made(torch.randn(2, IN))).all()


def test_autocast_settles_the_arithmetic_of_both_directions() -> None:
    made = layer(Grid(4, 32))
    x = torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16
    exact = made(x)
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.3)
    (reference,) = torch.autograd.grad(exact.sum(), made.a)
    (gradient,) = torch.autograd.grad(out.float().sum(), made.a)
    assert gradient.dtype == torch.float32
    assert functional.cosine_similarity(gradient.flatten(), reference.flatten(), dim=0) > 0.999
