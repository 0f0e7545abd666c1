"""Quantized weights as they are kept, computed with, and saved: packed integers, scales, zero points.

A :class:`PackedWeight` is one linear's weight. A :class:`PackedBlock` is everything that a decoder block's
module needs to be rebuilt: the packed weights of its linears and its other parameters (norms, biases). A
:class:`PackedLinear` computes with a packed weight; its float copy exists only inside one forward or backward
call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.config.grid import Grid
from engine.quant.grid import dequantize
from engine.quant.packing import bitpack, bitunpack
from engine.quant.slots import slots

SMALLEST_STORED_SCALE, LARGEST_STORED_SCALE = 2.0**-24, 65504.0
"""What a file can hold: float16, whatever the type of the rest of an export."""


def stored_scale(scale: Tensor) -> Tensor:
    """The scale as a file holds it: float16, and neither zero nor infinite where rounding would make it
    so. What others have quantized may have scales below zero."""
    held = scale.abs().clamp_(SMALLEST_STORED_SCALE, LARGEST_STORED_SCALE)
    return torch.copysign(held, scale).to(torch.float16)


def smallest_trained(initial: Tensor, fraction: float) -> Tensor:
    """The floor of each scale while it is trained: a fraction of what it was, that a file can hold. It has
    the scale's sign, on whose side of zero the scale stays."""
    return torch.copysign((initial.abs() * fraction).clamp_(min=SMALLEST_STORED_SCALE), initial)


def into_domain(scale: Tensor, floor: Tensor) -> Tensor:
    """Scales after a step of training, none nearer to zero than its floor and none beyond what a file can
    hold: so that what is trained is what is saved."""
    side = floor.sign()
    return torch.maximum(scale * side, floor * side).clamp_(max=LARGEST_STORED_SCALE).mul_(side)


class Domain:
    """Where scales, and zero points that are trained, have to be after each step of training: those of all
    linears of a network at once, because one by one that is a thousand launches of next to nothing. It holds
    on to the tensors, which have to stay where they are."""

    def __init__(
        self,
        scales: Sequence[Tensor],
        floors: Sequence[Tensor],
        zero_points: Sequence[Tensor] = (),
        tops: Sequence[float] = (),
    ) -> None:
        """``floors`` are those of :func:`smallest_trained`; ``tops`` the largest integer of each zero point's
        grid."""
        sides = [floor.sign() for floor in floors]
        self._scales, self._zero_points, self._tops = list(scales), list(zero_points), list(tops)
        self._least = [floor * side for floor, side in zip(floors, sides, strict=True)]
        self._sides = sides if any(bool((side < 0).any()) for side in sides) else []
        """Empty where all scales are above zero: multiplying by one changes nothing."""

    @torch.no_grad()
    def enter(self) -> None:
        """Bring all of them into it."""
        if self._scales:
            if self._sides:
                torch._foreach_mul_(self._scales, self._sides)
            torch._foreach_maximum_(self._scales, self._least)
            torch._foreach_clamp_max_(self._scales, LARGEST_STORED_SCALE)
            if self._sides:
                torch._foreach_mul_(self._scales, self._sides)
        if self._zero_points:
            torch._foreach_clamp_min_(self._zero_points, 0.0)
            torch._foreach_clamp_max_(self._zero_points, self._tops)


@dataclass(frozen=True)
class PackedWeight:
    """One quantized matrix ``[O, I]``.

    ``words`` int32 ``[O, I*bits/32]`` (packed along the input), ``scale`` float16 ``[O, G]``, ``zero_point``
    uint8 ``[O, G]``.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        groups = self.grid.groups(self.in_features)
        if self.scale.shape[1] != groups:
            raise ValueError(f"{self.scale.shape[1]} scales a row, where {self.grid} has {groups}")

    @classmethod
    def from_codes(
        cls, codes_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, grid: Grid
    ) -> PackedWeight:
        """Pack integers; the scale is rounded to float16 here, once, so that what is evaluated is what is
        saved."""
        return cls(
            words=bitpack(codes_OI, grid.bits, dim=1),
            scale=stored_scale(scale_OG),
            zero_point=zero_point_OG.round().clamp(0, grid.top).to(torch.uint8),
            grid=grid,
        )

    @property
    def bits(self) -> int:
        return self.grid.bits

    @property
    def out_features(self) -> int:
        return self.words.shape[0]

    @property
    def in_features(self) -> int:
        return self.words.shape[1] * 32 // self.bits

    @property
    def group_size(self) -> int:
        """Weights of a group, where the grid may say that it is the whole row."""
        return self.in_features // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes when packed: integers, float16 scales and ``bits``-wide zero points."""
        return self.words.numel() * 4 + self.scale.numel() * 2 + self.zero_point.numel() * self.bits // 8

    def codes(self) -> Tensor:
        """uint8 ``[O, I]``."""
        return bitunpack(self.words, self.bits, dim=1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(q - z) * s``, computed in float32 and rounded to ``dtype`` once."""
        return dequantize(self.codes(), self.scale.float(), self.zero_point).to(dtype)

    def to(self, device: torch.device | str) -> PackedWeight:
        return replace(
            self,
            words=self.words.to(device),
            scale=self.scale.to(device),
            zero_point=self.zero_point.to(device),
        )


class Kernels:
    """Whether packed weights on a GPU are worked on by :mod:`engine.quant.packed_kernels`."""

    on = False

    @classmethod
    def switch_on(cls, device: torch.device) -> None:
        """Use them from now on; raises what stands in their way (no Triton, no compiler) and leaves them
        off."""
        from engine.quant import packed_kernels

        packed_kernels.try_out(device)
        cls.on = True


class _PackedMatmul(torch.autograd.Function):
    """``x @ W^T`` from packed integers, keeping no float weight between forward and backward.

    EfficientQAT section 3.3: with the integers fixed, ``dW^/ds = q - z``, so the gradient of a scale is the
    group-wise sum of ``(q - z)`` times the gradient of the weight. ``dW^/dz = -s`` likewise.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, words: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, bits: int, kernels: bool
    ) -> Tensor:
        ctx.save_for_backward(x, words, scale_OG, zero_point_OG)
        ctx.bits, ctx.kernels = bits, kernels
        weight = _float_weight(words, scale_OG, zero_point_OG, bits, x.dtype, kernels)
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, words, scale_OG, zero_point_OG = ctx.saved_tensors
        grad_out = grads[0]
        grad_x = grad_scale = grad_zero = None
        if ctx.needs_input_grad[0]:
            weight = _float_weight(
                words, scale_OG, zero_point_OG, ctx.bits, grad_out.dtype, ctx.kernels, after=grad_out
            )
            grad_x = grad_out @ weight
            del weight
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_weight_OI = grad_out.flatten(0, -2).t() @ x.flatten(0, -2)
            weighted, plain = _group_sums(grad_weight_OI, words, scale_OG.shape[1], ctx.bits, ctx.kernels)
            if ctx.needs_input_grad[2]:
                grad_scale = weighted - _whole(zero_point_OG) * plain
            if ctx.needs_input_grad[3]:
                grad_zero = -plain * scale_OG
        return grad_x, None, grad_scale, grad_zero, None, None


def _whole(zero_point_OG: Tensor) -> Tensor:
    return zero_point_OG.round() if zero_point_OG.is_floating_point() else zero_point_OG


def _group_sums(
    grad_OI: Tensor, words: Tensor, groups: int, bits: int, kernels: bool
) -> tuple[Tensor, Tensor]:
    """Sums over each group of ``q dW^`` and of ``dW^``, float32 ``[O, G]``."""
    if kernels:
        weighted, plain = torch.ops.eqat.group_gradients(grad_OI, words, groups, bits).unbind()
        return weighted, plain
    grad_OGg = grad_OI.reshape(grad_OI.shape[0], groups, -1)
    codes_OGg = bitunpack(words, bits, dim=1).reshape(grad_OGg.shape)
    return (grad_OGg * codes_OGg).sum(-1, dtype=torch.float32), grad_OGg.sum(-1, dtype=torch.float32)


def _float_weight(
    words: Tensor,
    scale_OG: Tensor,
    zero_point_OG: Tensor,
    bits: int,
    dtype: torch.dtype,
    kernels: bool,
    after: Tensor | None = None,
) -> Tensor:
    zero = _whole(zero_point_OG)
    if kernels:
        weight: Tensor = torch.ops.eqat.dequantize(words, scale_OG, zero, bits, dtype, after)
        return weight
    return dequantize(bitunpack(words, bits, dim=1), scale_OG.float(), zero).to(dtype)


class PackedLinear(nn.Module):
    """A linear layer over a :class:`PackedWeight`.

    ``scale`` float32 ``[O, G]`` is a parameter; ``zero_point`` ``[O, G]`` becomes one (float32, rounded in
    the forward pass) after ``train_zero_points()`` and is a uint8 buffer otherwise.
    """

    words: Tensor

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.grid = weight.grid
        self.bits = weight.grid.bits
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.register_buffer("words", weight.words)
        # A copy: what is trained in here must not move under whoever has the packed weight.
        self.scale = nn.Parameter(weight.scale.to(torch.float32, copy=True), requires_grad=False)
        self.zero_point: Tensor | nn.Parameter
        self.register_buffer("zero_point", weight.zero_point)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.unpacked: Tensor | None = None
        """The float weight ``[O, I]``, while :func:`unpacked` keeps it."""

    def train_zero_points(self) -> nn.Parameter:
        """Turn the zero points into a float32 parameter and return it."""
        value = self.zero_point.to(torch.float32, copy=True)
        del self.zero_point
        self.zero_point = nn.Parameter(value)
        return self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        # Autocast does not reach the backward pass, so the arithmetic's dtype is settled here for both.
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if self.unpacked is not None and self.unpacked.dtype == dtype and not torch.is_grad_enabled():
            out = functional.linear(x.to(dtype), self.unpacked)
        else:
            kernels = Kernels.on and x.is_cuda
            out = _PackedMatmul.apply(
                x.to(dtype), self.words, self.scale, self.zero_point, self.bits, kernels
            )
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @torch.no_grad()
    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """``[O, I]``, as :meth:`forward` multiplies by it."""
        kernels = Kernels.on and self.words.is_cuda
        return _float_weight(self.words, self.scale, self.zero_point, self.bits, dtype, kernels)

    def packed(self) -> PackedWeight:
        """The weight as it would be saved now (scale as stored, zero point rounded to its integer)."""
        zero = self.zero_point.detach().float().round().clamp(0, self.grid.top).to(torch.uint8)
        return PackedWeight(self.words, stored_scale(self.scale.detach()), zero, self.grid)


@contextmanager
def unpacked(block: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, packed linears compute with a float weight that is made once, not for every batch; as long as
    nothing is differentiated."""
    layers = [module for module in block.modules() if isinstance(module, PackedLinear)]
    try:
        for layer in layers:
            layer.unpacked = layer.float_weight(dtype)
        yield
    finally:
        for layer in layers:
            layer.unpacked = None


@dataclass(frozen=True)
class PackedBlock:
    """A decoder block after quantization.

    ``linears`` by name relative to the block (``self_attn.q_proj``); ``others`` holds every remaining
    parameter by its relative name, biases of the quantized linears included.
    """

    linears: dict[str, PackedWeight] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes as exported: packed weights, everything else at 16 bits."""
        return sum(w.nbytes for w in self.linears.values()) + sum(t.numel() * 2 for t in self.others.values())

    def tensors(self) -> dict[str, Tensor]:
        """A flat dictionary for safetensors; :meth:`from_tensors` reads it back bit for bit."""
        flat = {f"other.{name}": tensor for name, tensor in self.others.items()}
        for name, weight in self.linears.items():
            flat[f"linear.{name}.words"] = weight.words
            flat[f"linear.{name}.scale"] = weight.scale
            flat[f"linear.{name}.zero_point"] = weight.zero_point
            flat[f"linear.{name}.grid"] = _grid_tensor(weight.grid)
        return {key: tensor.detach().cpu().contiguous() for key, tensor in flat.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], unsaid: Grid) -> PackedBlock:
        """The block of a flat dictionary; ``unsaid`` is the grid of linears that come without one, as earlier
        versions stored them."""
        names = [k.removeprefix("linear.").removesuffix(".words") for k in tensors if k.endswith(".words")]
        linears = {
            name: PackedWeight(
                tensors[f"linear.{name}.words"],
                tensors[f"linear.{name}.scale"],
                tensors[f"linear.{name}.zero_point"],
                _stored_grid(tensors.get(f"linear.{name}.grid"), unsaid),
            )
            for name in sorted(names)
        }
        others = {k.removeprefix("other."): tensors[k] for k in sorted(tensors) if k.startswith("other.")}
        return cls(linears, others)

    def install(self, block: nn.Module) -> nn.Module:
        """Replace the block's linears by packed ones and load its other parameters; returns the block."""
        device = self._install_others(block)
        for slot in slots(block, self.linears):
            weight, bias = self.linears[slot.name], self.others.get(f"{slot.name}.bias")
            if bias is not None:
                bias = bias.to(device=device, dtype=slot.get().weight.dtype, copy=True)  # type: ignore[arg-type]
            slot.set(PackedLinear(weight.to(device), bias))
        return block

    def install_dense(self, block: nn.Module) -> nn.Module:
        """Give the block's linears dequantized weights, and load its other parameters; returns the block."""
        device = self._install_others(block)
        for slot in slots(block, self.linears):
            linear = slot.linear()
            linear.weight.data = self.linears[slot.name].to(device).dequantize(linear.weight.dtype)
            bias = self.others.get(f"{slot.name}.bias")
            if bias is not None:
                linear.bias.data = bias.to(device=device, dtype=linear.weight.dtype, copy=True)
        return block

    def _install_others(self, block: nn.Module) -> torch.device:
        """Load the parameters that are not part of a quantized linear, copies that may be trained; the
        block's device."""
        device = next(block.parameters()).device
        own = dict(block.named_parameters())
        for name, tensor in self.others.items():
            if name.removesuffix(".bias") not in self.linears:
                own[name].data = tensor.to(device=device, dtype=own[name].dtype, copy=True)
        return device


def overlaid(block: Mapping[str, Tensor], later: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A block's flat dictionary with the tensors that a later stage made in the place of its own.

    ``later`` may call those of a linear by its name alone: ``mlp.up_proj.scale``.

    Raises:
        ValueError: for a tensor that the block does not have.
    """
    renewed = {f"linear.{name}" if f"linear.{name}" in block else name: later[name] for name in later}
    unknown = sorted(renewed.keys() - block.keys())
    if unknown:
        raise ValueError(f"the block has no {unknown[0]}")
    return {**block, **renewed}


def _grid_tensor(grid: Grid) -> Tensor:
    """Bits, group size, and 0 where each group has a zero point of its own, 1 on a symmetric grid, and one
    more than where all are fixed otherwise."""
    fixed = grid.fixed_zero_point
    held = 0 if fixed is None else 1 if grid.symmetric else 1 + fixed
    return torch.tensor([grid.bits, grid.group_size, held], dtype=torch.int32)


def _stored_grid(stored: Tensor | None, unsaid: Grid) -> Grid:
    if stored is None:
        return unsaid
    bits, group_size, held = stored.tolist()
    return Grid(bits, group_size, held == 1, held - 1 if held > 1 else None)
