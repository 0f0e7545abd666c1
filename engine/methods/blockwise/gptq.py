"""GPTQ on one matrix (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, and those
that are left move so as to undo what that did to the outputs.

With ``X`` what a linear is given, a row ``w`` of its weight costs the error

    || (w - w^) X ||^2 = (w - w^) H (w - w^)^T,   H = X X^T

When column ``i`` goes to the grid, the best that the columns behind it can do is (the paper's equation 2,
from Optimal Brain Surgeon)

    e = (w_i - w^_i) / [F^-1]_ii,   w_behind -= e [F^-1]_i,behind

where ``F`` is ``H`` without the columns before ``i``. All those inverses are read from one triangular matrix:
with ``H^-1 = U^T U``, ``U`` upper triangular, row ``i`` of ``[F^-1]`` divided by the root of its diagonal is
row ``i`` of ``U`` (section 3.3, step 3). So ``e = (w_i - w^_i) / U_ii`` and ``w_behind -= e U_i,behind``.

``U`` is not computed by way of ``H^-1``, whose errors in float32 would have to be factored again: read from
its last row and column to the first, ``H`` has a Cholesky factor that is upper triangular, ``H = R R^T``, and
``U`` is the inverse of ``R``. Before that a fraction of the mean diagonal is added to the diagonal, ten times
as much as long as the factorization fails.

Columns move by the error of those in their own chunk at once, by that of earlier chunks when their chunk is
complete: one matrix product (step 2). The order of columns is that of the matrix, so a group's scale and zero
point can be chosen when it is reached, from the weights as they have moved by then.

* Rows that come out worse than by plain rounding are rounded: GPTQ is greedy, and has no bound.
* An input that was always zero, or whose squares overflow, says nothing about its column: that goes to the
  nearest point, and moves no other.
* The weights as they were when they were rounded, the *latents*, are handed out with the integers.

Libraries that do this (GPTQModel, llm-compressor) bring loaders, model definitions and kernels of their own,
pin releases of transformers, and know neither fixed zero points other than the middle nor our ranges. What is
needed here are these few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config.gptq import CHUNK
from engine.config.grid import Grid
from engine.quant.grid import dequantize, quantize
from engine.quant.packed import stored_scale

MORE_DAMPING = 10.0
"""Where the Hessian cannot be factored."""


Ranges = Callable[[Tensor, Grid, int], tuple[Tensor, Tensor]]
"""Chooses scale and zero point of each group, float32 ``[O, G]``, of columns ``[O, I]`` of a matrix; a number
says which column the first one is."""


class Rounded(NamedTuple):
    """A matrix on its grid."""

    latent_OI: Tensor
    """The weights that were rounded: each goes to its integer."""
    scale_OG: Tensor
    """Float32, of values that a file can hold."""
    zero_OG: Tensor
    error_O: Tensor
    """``(w - w^) H (w - w^)^T`` of each row."""
    plain_error_O: Tensor
    """The same of plain rounding."""
    signal_O: Tensor
    """``w H w^T`` of each row: what the errors are a part of."""

    def weight(self, bits: int) -> Tensor:
        """``[O, I]``, as the network computes with it."""
        codes = quantize(self.latent_OI, self.scale_OG, self.zero_OG, bits)
        return dequantize(codes, self.scale_OG, self.zero_OG)


@torch.no_grad()
def round_to_nearest_point(weight_OI: Tensor, grid: Grid, ranges: Ranges) -> Rounded:
    """Plain rounding, where nothing is known of the inputs."""
    scale, zero = _stored(ranges(weight_OI, grid, 0))
    nothing = torch.zeros(len(weight_OI), device=weight_OI.device)
    return Rounded(weight_OI, scale, zero, nothing, nothing, nothing)


@torch.no_grad()
def round_matrix(
    weight_OI: Tensor,
    hessian_II: Tensor,
    factor_II: Tensor,
    grid: Grid,
    ranges: Ranges,
    *,
    values: int | None = None,
    poll: Callable[[], None] = lambda: None,
) -> Rounded:
    """GPTQ of ``weight``, for inputs whose sums of products are ``hessian`` (:func:`without_strange`) and
    whose :func:`inverse_factor` is ``factor``.

    ``values`` weights are worked on together, all when not given. ``poll`` is called between chunks of
    columns, and may raise to stop.
    """
    rows = len(weight_OI) if values is None else max(1, values // weight_OI.shape[1])
    parts = [_rounded_rows(part, hessian_II, factor_II, grid, ranges, poll) for part in weight_OI.split(rows)]
    return Rounded(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _rounded_rows(
    weight_OI: Tensor,
    hessian_II: Tensor,
    factor_II: Tensor,
    grid: Grid,
    ranges: Ranges,
    poll: Callable[[], None],
) -> Rounded:
    def error(scale_OG: Tensor, zero_OG: Tensor, latent_OI: Tensor) -> Tensor:
        made = dequantize(quantize(latent_OI, scale_OG, zero_OG, grid.bits), scale_OG, zero_OG)
        return quadratic(weight_OI - made, hessian_II)

    plain = _stored(ranges(weight_OI, grid, 0))
    plain_error = error(*plain, weight_OI)
    latent, scale, zero = round_columns(weight_OI, factor_II, grid, ranges, poll)
    found = error(scale, zero, latent)
    better = found <= plain_error  # not where it is NaN
    column = better.unsqueeze(1)
    return Rounded(
        torch.where(column, latent, weight_OI),
        torch.where(column, scale, plain[0]),
        torch.where(column, zero, plain[1]),
        torch.where(better, found, plain_error),
        plain_error,
        quadratic(weight_OI, hessian_II),
    )


def round_columns(
    weight_OI: Tensor,
    factor_II: Tensor,
    grid: Grid,
    ranges: Ranges,
    poll: Callable[[], None] = lambda: None,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents ``[O, I]``, scales and zero points ``[O, G]``, by the recursion in the head of this file.

    The matrix lies here as columns, each in one piece: ``rest[i]`` is column ``i``.
    """
    columns = weight_OI.shape[1]
    size = columns // grid.groups(columns)
    of_group = replace(grid, group_size=-1)
    rest = weight_OI.t().to(factor_II.dtype, copy=True, memory_format=torch.contiguous_format)
    found: list[tuple[Tensor, Tensor]] = []
    for part in _chunks(columns, size, chunk):
        poll()
        errors = torch.empty_like(rest[part])
        for place in range(part.start, part.stop):
            if place % size == 0:
                scale, zero = _stored(ranges(rest[place : place + size].t(), of_group, place))
                found.append((scale, zero))
                scale, zero = scale[:, 0], zero[:, 0]
            weight = rest[place]
            steps = (weight / scale).round_().add_(zero).clamp_(0, grid.top)
            made = steps.sub_(zero).mul_(scale)
            error = torch.div(weight - made, factor_II[place, place], out=errors[place - part.start])
            rest[place + 1 : part.stop].addr_(factor_II[place, place + 1 : part.stop], error, alpha=-1)
        rest[part.stop :].addmm_(factor_II[part, part.stop :].t(), errors, alpha=-1)
    scales, zeros = zip(*found, strict=True)
    return rest.t().contiguous(), torch.cat(scales, 1), torch.cat(zeros, 1)


def _chunks(columns: int, group: int, most: int) -> Iterator[slice]:
    """Parts of the columns, at most ``most`` at a time; a group begins with a part or lies within one, so
    that all of its weights have moved when it is reached."""
    size = group * (most // group) if group <= most else most
    step = size if group <= most else group
    for first in range(0, columns, step):
        end = min(first + step, columns)
        for start in range(first, end, size):
            yield slice(start, min(start + size, end))


def _stored(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Scales as a file holds them, so that integers are chosen for what will be read."""
    return stored_scale(found[0]).float(), found[1].float()


def quadratic(rows_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """``r H r^T`` of each row."""
    return ((rows_OI @ hessian_II) * rows_OI).sum(1)


@torch.no_grad()
def without_strange(hessian_II: Tensor) -> Tensor:
    """The Hessian, in its place, with a mean diagonal of 1 and without inputs whose sum of squares is not
    finite: such a one has neither a square nor anything in common with the others, like one that was always
    zero."""
    diagonal = hessian_II.diagonal()
    strange = ~diagonal.isfinite()
    hessian_II.masked_fill_(strange, 0.0).masked_fill_(strange.unsqueeze(1), 0.0)
    mean = diagonal.double().mean()
    return hessian_II.div_(mean.to(hessian_II.dtype)) if mean > 0 else hessian_II


@torch.no_grad()
def inverse_factor(hessian_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """``U``, upper triangular, with ``U^T U`` the inverse of the damped Hessian (:func:`without_strange`);
    and by what fraction of the mean diagonal it was damped."""
    while True:
        damped = hessian_II.flip(0, 1)
        damped.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(damped)
        del damped
        if info.item() == 0 and bool(factor.diagonal().isfinite().all()):
            break
        # Ends: what dominates the diagonal by more than rounding errors can be factored.
        damping *= MORE_DAMPING
    upper = factor.flip(0, 1)
    del factor
    one = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, one, upper=True), damping
