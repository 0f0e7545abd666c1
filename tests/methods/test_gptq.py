"""GPTQ on one matrix, against the paper's recursion written with an explicit inverse at every column; and
that it is never worse than plain rounding."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config.gptq import LEAST_DAMPING
from engine.config.grid import Grid
from engine.methods.blockwise.gptq import (
    Ranges,
    inverse_factor,
    quadratic,
    round_columns,
    round_matrix,
    without_strange,
)
from engine.quant.grid import dequantize, initial_range, quantize
from engine.quant.packed import stored_scale

DAMPING = 0.01


def ranges(weight_OI: Tensor, grid: Grid, first: int) -> tuple[Tensor, Tensor]:
    return initial_range(weight_OI, grid, method="search")


def correlated(inputs: int, tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs ``[N, I]`` that go together, as those of networks do: a few directions carry most of them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    drawn_NI = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    return (drawn_NI * torch.logspace(0, -2, inputs, dtype=torch.float64) @ shapes).to(dtype)


def drawn(outputs: int, inputs: int, *, seed: int = 1) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def hessian_of(tokens_NI: Tensor) -> Tensor:
    return without_strange(tokens_NI.t() @ tokens_NI)


def by_hand(weight_OI: Tensor, hessian_II: Tensor, grid: Grid, chosen: Ranges) -> tuple[Tensor, ...]:
    """Equation 2 of the paper, column by column: what is behind a column moves by the error over the diagonal
    of the inverse of what is left of the Hessian."""
    damped = hessian_II + DAMPING * torch.eye(len(hessian_II), dtype=hessian_II.dtype)
    weight = weight_OI.to(hessian_II.dtype).clone()
    columns = weight.shape[1]
    size = columns // grid.groups(columns)
    of_group = replace(grid, group_size=-1)
    codes, scales, zeros = [], [], []
    for i in range(columns):
        if i % size == 0:
            scale, zero = chosen(weight[:, i : i + size], of_group, i)
            scales.append(stored_scale(scale).float())
            zeros.append(zero)
        codes.append(quantize(weight[:, i : i + 1], scales[-1], zeros[-1], grid.bits))
        made = dequantize(codes[-1], scales[-1], zeros[-1])[:, 0]
        inverse = torch.linalg.inv(damped[i:, i:])
        error = (weight[:, i] - made) / inverse[0, 0]
        weight[:, i + 1 :] -= error[:, None] * inverse[0, 1:]
    return torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1)


@pytest.mark.parametrize(
    ("inputs", "grid", "chunk"),
    [
        (40, Grid(2, 8), 24),
        (36, Grid(3, 12), 128),
        (45, Grid(4, -1), 7),
        (64, Grid(4, 32), 32),
        (48, Grid(3, 16, symmetric=True), 20),
        (60, Grid(2, 20, fixed_zero_point=1), 8),
        (60, Grid(3, 20, symmetric=True, turns=True), 8),
        (56, Grid(8, 28), 16),
        (150, Grid(4, -1), 128),
        (33, Grid(2, 33), 128),
    ],
)
def test_it_is_the_recursion_of_the_paper(inputs: int, grid: Grid, chunk: int) -> None:
    hessian = hessian_of(correlated(inputs, 3 * inputs, dtype=torch.float64))
    weight = drawn(7, inputs)
    factor, damping = inverse_factor(hessian, DAMPING)
    assert damping == DAMPING
    latent, scale, zero = round_columns(weight, factor, grid, ranges, chunk=chunk)
    codes, scales, zeros = by_hand(weight, hessian, grid, ranges)
    assert torch.equal(scale, scales)
    assert torch.equal(zero, zeros)
    assert torch.equal(quantize(latent, scale, zero, grid.bits), codes)
    assert not torch.equal(codes, quantize(weight, *initial_range(weight, grid), grid.bits))


def test_in_float32_it_errs_as_little() -> None:
    tokens = correlated(192, 500, dtype=torch.float64)
    weight, grid = drawn(40, 192), Grid(3, 64)
    errors = []
    for dtype in (torch.float64, torch.float32):
        hessian = hessian_of(tokens.to(dtype))
        found = round_columns(weight, inverse_factor(hessian, DAMPING)[0], grid, ranges)
        codes = quantize(*found, grid.bits)
        made = dequantize(codes, *found[1:])
        errors.append(float(quadratic((weight - made).double(), hessian_of(tokens)).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    hessian = hessian_of(correlated(50, 120, dtype=torch.float64))
    factor, _ = inverse_factor(hessian, 0.05)
    assert torch.equal(factor, factor.triu())
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(50, dtype=torch.float64)
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(damped))


# -- against plain rounding ----------------------------------------------------------------------------


def output_error(weight_OI: Tensor, made_OI: Tensor, tokens_NI: Tensor) -> Tensor:
    """Of each output the sum of squared errors, as it is, by no Hessian."""
    return ((weight_OI - made_OI).double() @ tokens_NI.double().t()).square().sum(1)


def both(weight: Tensor, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Errors of each output by GPTQ and by plain rounding."""
    hessian = hessian_of(tokens)
    found = round_matrix(weight, hessian, inverse_factor(hessian, DAMPING)[0], grid, ranges)
    scale, zero = initial_range(weight, grid, method="search")
    scale = stored_scale(scale).float()
    plain = dequantize(quantize(weight, scale, zero, grid.bits), scale, zero)
    return output_error(weight, found.weight(grid.bits), tokens), output_error(weight, plain, tokens)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, -1])
def test_on_inputs_that_go_together_it_is_far_better_than_rounding(bits: int, group: int) -> None:
    mine, plain = both(drawn(48, 128), correlated(128, 1000), Grid(bits, group))
    assert mine.sum() < 0.4 * plain.sum()
    assert (mine <= plain * (1 + 1e-4)).all()


@settings(max_examples=30)
@given(
    st.integers(1, 9),
    st.sampled_from([(16, 8), (24, 24), (40, 20), (130, 130)]),
    st.integers(1, 60),
    st.sampled_from([2, 3, 4]),
    st.integers(0, 1000),
)
def test_no_output_is_worse_than_by_rounding(
    outputs: int, shape: tuple[int, int], tokens: int, bits: int, seed: int
) -> None:
    """However few tokens there are, and whether or not they go together."""
    inputs, group = shape
    generator = torch.Generator().manual_seed(seed)
    given_NI = torch.randn(tokens, inputs, generator=generator)
    if seed % 2:
        given_NI = correlated(inputs, tokens, seed=seed)
    given_NI[:, seed % inputs] = 0
    mine, plain = both(drawn(outputs, inputs, seed=seed), given_NI, Grid(bits, group))
    assert (mine <= plain * (1 + 1e-3) + 1e-6).all()


def test_rows_are_rounded_alike_however_many_at_a_time() -> None:
    tokens, weight, grid = correlated(64, 300), drawn(20, 64), Grid(3, 16)
    hessian = hessian_of(tokens)
    factor, _ = inverse_factor(hessian, DAMPING)
    whole, parts = (
        round_matrix(weight, hessian, factor, grid, ranges, values=values) for values in (None, 64 * 3)
    )
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


# -- strange inputs ------------------------------------------------------------------------------------


def test_an_input_that_is_always_zero_is_rounded_to_nearest_and_moves_nothing() -> None:
    tokens = correlated(32, 200, dtype=torch.float64)
    tokens[:, [3, 17]] = 0
    weight, grid = drawn(6, 32), Grid(3, 8)
    factor, _ = inverse_factor(hessian_of(tokens), DAMPING)
    latent, *_ = round_columns(weight, factor, grid, ranges)
    assert torch.equal(latent[:, [3, 17]].float(), weight[:, [3, 17]])
    alive = [i for i in range(32) if i not in (3, 17)]
    assert (latent[:, alive][:, 1:].float() != weight[:, alive][:, 1:]).float().mean() > 0.9


@pytest.mark.parametrize("strange", [torch.inf, torch.nan, 1e25])
def test_an_input_that_is_not_finite_is_rounded_to_nearest_and_moves_nothing(strange: float) -> None:
    tokens = correlated(32, 200)
    tokens[5, 3], tokens[9, 17] = strange, strange
    raw = tokens.t() @ tokens
    assert not raw[3].isfinite().all()
    hessian = without_strange(raw.clone())
    assert hessian.isfinite().all()
    weight, grid = drawn(6, 32), Grid(3, 8)
    factor, _ = inverse_factor(hessian, DAMPING)
    latent, scale, zero = round_columns(weight, factor, grid, ranges)
    assert torch.equal(latent[:, [3, 17]], weight[:, [3, 17]])
    assert all(part.isfinite().all() for part in (latent, scale, zero))
    others = [i for i in range(32) if i not in (3, 17)]
    expected = tokens[:, others].t() @ tokens[:, others]
    ratio = hessian[others][:, others] / expected
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_inputs_that_say_nothing_leave_plain_rounding(value: float) -> None:
    weight, grid = drawn(5, 24), Grid(2, 8)
    hessian = without_strange(torch.full((24, 24), value))
    found = round_matrix(weight, hessian, inverse_factor(hessian, DAMPING)[0], grid, ranges)
    assert torch.equal(found.latent_OI, weight)
    scale, zero = initial_range(weight, grid, method="search")
    assert torch.equal(found.scale_OG, stored_scale(scale).float())
    assert torch.equal(found.zero_OG, zero)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_the_size_of_inputs_is_nothing_to_it(size: float) -> None:
    weight, grid = drawn(5, 24), Grid(4, 8)
    tokens = correlated(24, 100)
    one, other = (
        round_columns(weight, inverse_factor(hessian_of(tokens * factor), DAMPING)[0], grid, ranges)
        for factor in (1.0, size)
    )
    torch.testing.assert_close(one[0], other[0], rtol=1e-3, atol=1e-4)


def test_a_hessian_that_cannot_be_factored_is_damped_more() -> None:
    hessian = torch.ones(200, 200)  # of rank 1, and in float32 not even that
    hessian[:100, 100:] = hessian[100:, :100] = 1.0001
    factor, damping = inverse_factor(hessian, LEAST_DAMPING)
    assert damping > LEAST_DAMPING
    assert factor.isfinite().all()


def test_poll_is_asked_between_chunks() -> None:
    hessian = hessian_of(correlated(64, 100))
    calls = itertools.count()

    def stop() -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        round_columns(drawn(3, 64), inverse_factor(hessian, DAMPING)[0], Grid(4, 8), ranges, stop, chunk=8)
