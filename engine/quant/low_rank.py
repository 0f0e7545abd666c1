"""A linear layer whose weight is a frozen latent and a product of two thin factors, on the grid (LR-QAT,
arXiv 2406.06385).

    V  = L + (alpha / r) A B                             latents, counted in grid steps
    W^ = (clamp(round(V) + z, 0, Q) - z) s               what the network computes with

``L`` ``[O, I]`` is frozen and kept in few bits (:mod:`engine.quant.downcast`), ``A`` is ``[O, r]``, ``B``
``[r, I]``, ``s`` and ``z`` are ``[O, G]``. Gradients are those of a weight counted in grid steps
(:mod:`engine.quant.grid`), brought on to the factors:

    dV = inside * s * dW^,   dA = (alpha / r) dV B^T,   dB = (alpha / r) A^T dV

Everything from ``L`` to the product with the input is computed again in the backward pass. So nothing of the
size ``[O, I]`` but ``L`` outlives a call, however many linears a network has. After training the sum is
rounded once (:meth:`LowRankLinear.freeze`): what is saved has no factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.config.grid import Grid
from engine.config.latents import Downcast
from engine.quant.downcast import downcast, upcast
from engine.quant.fake_linear import FakeQuantLinear
from engine.quant.grid import RELATIVE_SCALE_FLOOR
from engine.quant.packed import PackedWeight, into_domain, smallest_trained

OVERSAMPLED, POWERS = 8, 2
"""Of the search for singular vectors: directions beyond those that are wanted, and rounds."""


@dataclass(frozen=True)
class LowRank:
    """How factors are made."""

    rank: int = 32
    alpha: float = 1.0
    """The factors' product counts ``alpha / rank``."""
    form: Downcast = "fixed"
    """Of the frozen latents."""
    zero_factor: Literal["a", "b"] = "a"
    """The factor that is zero at the start."""
    start: Literal["kaiming", "svd"] = "kaiming"
    """What the other one is: uniform noise, or singular vectors of the frozen latents, as large."""
    dtype: torch.dtype = torch.float32
    """Of the factors."""

    @property
    def ratio(self) -> float:
        return self.alpha / self.rank


class _Frozen(NamedTuple):
    """What does not change of a layer, and how to read it."""

    grid: Grid
    ratio: float


def latent_steps(kept: Tensor, origin_OG: Tensor, a_Or: Tensor, b_rI: Tensor, frozen: _Frozen) -> Tensor:
    """``V``, float32 ``[O, I]``; ``origin`` is the zero point that ``kept`` is counted from."""
    steps_OI = upcast(kept, origin_OG, frozen.grid)
    return steps_OI.addmm_(a_Or.float(), b_rI.float(), alpha=frozen.ratio)


def _integers(steps_OI: Tensor, zero_OG: Tensor) -> Tensor:
    """``round(V) + z`` before it is clamped, ``[O, G, I/G]``, in the memory of ``steps``."""
    return steps_OI.round_().view(*zero_OG.shape, -1).add_(zero_OG.unsqueeze(-1))


def _factor_gradients(
    moved_OI: Tensor, a_Or: Tensor, b_rI: Tensor, ratio: float, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """``dA`` and ``dB`` of ``dV``, as far as they are wanted."""
    grad_a = grad_b = None
    if wanted[0]:
        grad_a = (moved_OI @ b_rI.to(moved_OI.dtype).t()).mul(ratio).to(a_Or.dtype)
    if wanted[1]:
        grad_b = (a_Or.to(moved_OI.dtype).t() @ moved_OI).mul(ratio).to(b_rI.dtype)
    return grad_a, grad_b


def low_rank_matmul(
    x: Tensor,
    kept: Tensor,
    origin_OG: Tensor,
    a_Or: Tensor,
    b_rI: Tensor,
    scale_OG: Tensor,
    zero_point_OG: Tensor,
    frozen: _Frozen,
) -> Tensor:
    """``x W^T``, by the kernels where they are switched on and can do it."""
    trained = a_Or, b_rI, scale_OG, zero_point_OG
    out: Tensor
    if _by_kernel(kept, a_Or, scale_OG):
        bits, ratio = frozen.grid.bits, frozen.ratio
        out = _LowRankMatmulByKernel.apply(x, kept, origin_OG, *trained, bits, ratio)
    else:
        out = _LowRankMatmul.apply(x, kept, origin_OG, *trained, frozen)
    return out


class _LowRankMatmul(torch.autograd.Function):
    """``x W^T``, which keeps ``x`` and the layer's own tensors, and no float weight, for the backward pass.

    The factors' gradients are products in the type of the arithmetic, like that of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor,
        origin_OG: Tensor,
        a_Or: Tensor,
        b_rI: Tensor,
        scale_OG: Tensor,
        zero_point_OG: Tensor,
        frozen: _Frozen,
    ) -> Tensor:
        ctx.save_for_backward(x, kept, origin_OG, a_Or, b_rI, scale_OG, zero_point_OG)
        ctx.frozen = frozen
        top = frozen.grid.top
        zero_OG = zero_point_OG.round().clamp_(0, top)
        q_OGg = _integers(latent_steps(kept, origin_OG, a_Or, b_rI, frozen), zero_OG).clamp_(0, top)
        weight_OGg = q_OGg.sub_(zero_OG.unsqueeze(-1)).mul_(scale_OG.unsqueeze(-1))
        return functional.linear(x, weight_OGg.flatten(1).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, origin_OG, a_Or, b_rI, scale_OG, zero_point_OG = ctx.saved_tensors
        grid, ratio = ctx.frozen.grid, ctx.frozen.ratio
        wanted, grad_out = ctx.needs_input_grad, grads[0]
        scale, rounded_zero = scale_OG.unsqueeze(-1), zero_point_OG.round()
        zero_OG = rounded_zero.clamp(0, grid.top)
        unclamped = _integers(latent_steps(kept, origin_OG, a_Or, b_rI, ctx.frozen), zero_OG)
        inside = (unclamped >= 0) & (unclamped <= grid.top)
        centred = unclamped.clamp_(0, grid.top).sub_(zero_OG.unsqueeze(-1))

        grad_x = grad_a = grad_b = grad_scale = grad_zero = None
        if wanted[0]:
            grad_x = grad_out @ (centred * scale).flatten(1).to(grad_out.dtype)
        if any(wanted[3:7]):
            grad_OI = grad_out.flatten(0, -2).t() @ x.flatten(0, -2)
            grad_OGg = grad_OI.view(centred.shape)
            if wanted[5]:
                grad_scale = centred.mul_(grad_OGg).sum(-1, dtype=torch.float32)
            if wanted[6]:
                # Straight through the rounding of z, exact through its clamp.
                moves = (rounded_zero >= 0) & (rounded_zero <= grid.top)
                outside = grad_OGg.masked_fill(inside, 0).sum(-1, dtype=torch.float32)
                grad_zero = -outside * scale_OG * moves
            grad_OI = grad_OGg.mul_(inside).mul_(scale).view(grad_OI.shape)
            grad_a, grad_b = _factor_gradients(grad_OI, a_Or, b_rI, ratio, wanted[3:5])
        return grad_x, None, None, grad_a, grad_b, grad_scale, grad_zero, None


class Kernel:
    """Whether weights on a GPU are made by :mod:`engine.quant.low_rank_kernel`."""

    on = False

    @classmethod
    def switch_on(cls, device: torch.device) -> None:
        """Use it from now on; raises what stands in its way and leaves it off."""
        from engine.quant import low_rank_kernel

        low_rank_kernel.try_out(device)
        cls.on = True


def _by_kernel(kept: Tensor, a_Or: Tensor, scale_OG: Tensor) -> bool:
    if not Kernel.on:
        return False
    from engine.quant import low_rank_kernel

    return low_rank_kernel.takes(kept, a_Or.shape[1], scale_OG.shape[1])


class _LowRankMatmulByKernel(torch.autograd.Function):
    """The same by :mod:`engine.quant.low_rank_kernel`, whose operators a compiler does not look into."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor,
        origin_OG: Tensor,
        a_Or: Tensor,
        b_rI: Tensor,
        scale_OG: Tensor,
        zero_point_OG: Tensor,
        bits: int,
        ratio: float,
    ) -> Tensor:
        ctx.save_for_backward(x, kept, origin_OG, a_Or, b_rI, scale_OG, zero_point_OG)
        ctx.bits, ctx.ratio = bits, ratio
        zero_OG = zero_point_OG.round().clamp(0, (1 << bits) - 1)
        latents = kept, origin_OG, a_Or, b_rI, scale_OG, zero_OG
        return functional.linear(x, torch.ops.eqat.low_rank_weight(*latents, bits, ratio, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """A pass that needs the input's gradient alone forms the weight and nothing else."""
        x, kept, origin_OG, a_Or, b_rI, scale_OG, zero_point_OG = ctx.saved_tensors
        bits, ratio, wanted, grad_out = ctx.bits, ctx.ratio, ctx.needs_input_grad, grads[0]
        rounded_zero = zero_point_OG.round()
        zero_OG = rounded_zero.clamp(0, (1 << bits) - 1)
        latents = kept, origin_OG, a_Or, b_rI, scale_OG, zero_OG
        grad_x = grad_a = grad_b = grad_scale = grad_zero = None
        if any(wanted[3:7]):
            grad_OI = grad_out.flatten(0, -2).t() @ x.flatten(0, -2)
            weight, moved_OI, sums = torch.ops.eqat.low_rank_gradients(
                *latents, bits, ratio, grad_OI, wanted[6]
            )
            del grad_OI
            grad_scale = sums[0] if wanted[5] else None
            if wanted[6]:
                # Straight through the rounding of z, exact through its clamp.
                grad_zero = -sums[1] * scale_OG * (zero_OG == rounded_zero)
            grad_a, grad_b = _factor_gradients(moved_OI, a_Or, b_rI, ratio, wanted[3:5])
        else:
            weight = torch.ops.eqat.low_rank_weight(*latents, bits, ratio, grad_out.dtype, grad_out)
        if wanted[0]:
            grad_x = grad_out @ weight
        return grad_x, None, None, grad_a, grad_b, grad_scale, grad_zero, None, None


class LowRankLinear(nn.Module):
    """A linear layer over frozen latents and two factors.

    ``a``, ``b``, ``scale`` and ``zero_point`` are parameters; ``bias`` is not trained.
    """

    kept: Tensor
    origin: Tensor
    scale_floor: Tensor

    def __init__(self, linear: FakeQuantLinear, how: LowRank, seed: int) -> None:
        """The layer that begins as ``linear``, whose weight is counted in grid steps, but for what
        ``how.form`` does not hold of it; ``seed`` is that of the factor that is not zero."""
        super().__init__()
        assert linear.in_steps, "latents are counted in grid steps"
        self.grid, self.how = linear.grid, how
        self.bias = linear.bias
        steps, zero = linear.weight.detach(), linear.zero_point.detach().round()
        self.register_buffer("kept", downcast(steps, zero, self.grid, how.form))
        self.register_buffer("origin", zero.to(torch.uint8))
        held = upcast(self.kept, self.origin, self.grid)
        a_Or, b_rI = (factor.to(how.dtype) for factor in initial_factors(held, how, seed))
        self.a = nn.Parameter(a_Or, requires_grad=False)
        self.b = nn.Parameter(b_rI, requires_grad=False)
        scale = linear.scale.detach()
        floor = smallest_trained(scale, RELATIVE_SCALE_FLOOR)
        self.scale = nn.Parameter(into_domain(scale, floor), requires_grad=False)
        self.zero_point = nn.Parameter(zero, requires_grad=False)
        self.register_buffer("scale_floor", floor)
        self._frozen = _Frozen(self.grid, how.ratio)

    def forward(self, x: Tensor) -> Tensor:
        # Autocast does not reach the backward pass, so the arithmetic's dtype is settled here for both.
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        tensors = self.kept, self.origin, self.a, self.b, self.scale, self.zero_point
        out = low_rank_matmul(x.to(dtype), *tensors, self._frozen)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @property
    def by_kernel(self) -> bool:
        """Whether kernels make the weight, which nothing keeps then, compiled or not."""
        return _by_kernel(self.kept, self.a, self.scale)

    @torch.no_grad()
    def freeze(self) -> PackedWeight:
        """Merge the factors and round, once: the integers are those of the forward pass, since a scale that
        is rounded to float16 changes no latent."""
        zero = self.zero_point.round()
        steps = latent_steps(self.kept, self.origin, self.a, self.b, self._frozen)
        codes = _integers(steps, zero).clamp_(0, self.grid.top).to(torch.uint8).flatten(1)
        return PackedWeight.from_codes(codes, self.scale, zero, self.grid)


# -- the start -----------------------------------------------------------------------------------------


def initial_factors(steps_OI: Tensor, how: LowRank, seed: int) -> tuple[Tensor, Tensor]:
    """``A`` and ``B``, float32: one is zero, so that their product is; the other is what ``how`` says.

    It is drawn on the CPU, the same whatever the device.
    """
    outputs, inputs = steps_OI.shape
    generator = torch.Generator().manual_seed(seed)
    shape, fan_in = (
        ((how.rank, inputs), inputs) if how.zero_factor == "a" else ((outputs, how.rank), how.rank)
    )
    bound = 1 / math.sqrt(fan_in)  # Kaiming's for a layer without a nonlinearity, as LoRA takes it
    other = torch.empty(shape).uniform_(-bound, bound, generator=generator).to(steps_OI.device)
    if how.start == "svd":
        wide = steps_OI if how.zero_factor == "a" else steps_OI.t()
        found_rN = principal_rows(wide, how.rank, generator)
        # Rows of length 1, made as large as the noise in whose place they are.
        found_rN = found_rN * (bound / math.sqrt(3) * math.sqrt(wide.shape[1]))
        target = other if how.zero_factor == "a" else other.t()
        target[: len(found_rN)] = found_rN
    if how.zero_factor == "a":
        return torch.zeros(outputs, how.rank, device=steps_OI.device), other
    return other, torch.zeros(how.rank, inputs, device=steps_OI.device)


def principal_rows(matrix_MN: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The right singular vectors of the ``count`` largest singular values, as rows, or all where there are
    fewer: by iterating a random subspace, since a decomposition of a large matrix takes minutes."""
    width = min(count + OVERSAMPLED, *matrix_MN.shape)
    basis = torch.randn(matrix_MN.shape[1], width, generator=generator).to(matrix_MN.device)
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix_MN.t() @ torch.linalg.qr(matrix_MN @ basis).Q).Q
    _, _, right = torch.linalg.svd(matrix_MN @ basis, full_matrices=False)
    return (right @ basis.t())[:count]
