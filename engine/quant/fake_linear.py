"""A linear layer that trains its weight, scale and zero point on the grid.

In its plain form the forward pass quantizes the weight, and autograd brings the gradients back through the
quantizer. In its fast form (after :meth:`FakeQuantLinear.keep_quantized`) the quantized weight is a tensor of
its own: forward and backward are those of an ordinary linear layer, and whoever takes the optimizer's step
brings the gradient back and quantizes anew (:mod:`engine.quant.quant_step`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.config.grid import Grid
from engine.config.latents import Downcast
from engine.quant.announced import announced
from engine.quant.downcast import downcast
from engine.quant.grid import (
    RELATIVE_SCALE_FLOOR,
    dequantize,
    fake_quantize,
    fake_quantize_steps,
    initial_range,
    quantize,
)
from engine.quant.packed import (
    PackedBlock,
    PackedLinear,
    PackedWeight,
    into_domain,
    smallest_trained,
    stored_scale,
)
from engine.quant.slots import slots

TRAINED = ("weight", "scale", "zero_point", "quantized", "low", "high")
"""A linear's parameters that its packed weight stands for."""


class FakeQuantLinear(nn.Module):
    """``x @ fake_quantize(W)^T + bias`` with float32 master parameters.

    ``weight`` ``[O, I]``, ``scale`` and ``zero_point`` ``[O, G]``; ``bias`` is not trained. ``in_steps`` says
    that the weight is counted in grid steps.
    """

    scale_floor: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        grid: Grid,
        bias: nn.Parameter | None = None,
        *,
        in_steps: bool = False,
    ) -> None:
        """``weight`` ``[O, I]``, ``scale`` and ``zero_point`` ``[O, G]``, all float32, are taken over."""
        super().__init__()
        self.grid, self.in_steps = grid, in_steps
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        floor = smallest_trained(scale, RELATIVE_SCALE_FLOOR)
        self.scale = nn.Parameter(into_domain(scale, floor), requires_grad=False)
        self.zero_point = nn.Parameter(zero_point, requires_grad=False)
        self.register_buffer("scale_floor", floor)
        self.quantized: nn.Parameter | None
        """``[O, I]`` in the arithmetic's dtype; none in the plain form."""
        self.register_parameter("quantized", None)
        self.low: nn.Parameter | None
        """The ends of each group's range ``[O, G]``, where only these are trained (:meth:`only_clip`)."""
        self.high: nn.Parameter | None
        self.register_parameter("low", None)
        self.register_parameter("high", None)
        self._announces: tuple[Tensor, int] | None = None
        self._started: Tensor | None = None
        self._ends: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of_linear(
        cls,
        linear: nn.Linear,
        grid: Grid,
        *,
        method: Literal["minmax", "search"] = "search",
        norm: float = 2.5,
    ) -> FakeQuantLinear:
        """A linear on its initial grid; ``method`` and ``norm`` are those of
        :func:`~engine.quant.grid.initial_range`."""
        weight = linear.weight.detach().float()
        return cls(weight, *initial_range(weight, grid, method=method, norm=norm), grid, linear.bias)

    @classmethod
    def of_packed(
        cls, packed: PackedWeight, bias: nn.Parameter | None = None, latent: Tensor | None = None
    ) -> FakeQuantLinear:
        """A linear whose weights are counted in grid steps: ``latent`` ``[O, I]``, in those of ``packed``; or
        its integers, each in the middle of what is rounded to it.

        A group whose scale is below zero, as others make them, is turned around, which changes no weight:
        ``(q - z) s`` is ``((Q - q) - (Q - z)) (-s)``. On a grid that fixes its zero points it stays as it is,
        since ``Q - z`` would be another one.
        """
        scale, zero = packed.scale.float(), packed.zero_point.float()
        turned = (scale < 0) & (packed.grid.fixed_zero_point is None)
        sign = torch.where(turned, -1.0, 1.0)
        if latent is None:
            steps = dequantize(packed.codes(), sign, zero)
        else:
            steps = dequantize(latent.float(), sign, torch.zeros_like(zero))
        zero = torch.where(turned, packed.grid.top - zero, zero)
        return cls(steps, scale * sign, zero, packed.grid, bias, in_steps=True)

    def keep_quantized(self, dtype: torch.dtype) -> nn.Parameter:
        """Make room for the quantized weight, which is the caller's to fill and to keep up to date."""
        self.quantized = nn.Parameter(torch.empty_like(self.weight, dtype=dtype))
        return self.quantized

    def announce(self, token: Tensor, number: int) -> None:
        """From now on the quantized weight's gradient says when it is there
        (:mod:`engine.quant.announced`)."""
        self._announces = token, number

    def only_round(self) -> nn.Parameter:
        """From now on the weight may leave its place by half a grid step at most.

        What is trained of it is which way it is rounded: AutoRound's ``V`` in [-1/2, 1/2] (arXiv 2309.05516)
        in the weight's own units.
        """
        self._started = self.weight.detach().clone()
        return self.weight

    def only_clip(self) -> tuple[nn.Parameter, nn.Parameter]:
        """From now on scale and zero point follow from the ends of each group's range::

            s = (high - low) / Q,   z = -low / s

        These begin where they are, as far as that is within the smallest and the largest weight of the group,
        0 included, and stay within them: OmniQuant's learnable weight clipping (arXiv 2308.13137), whose
        ``beta`` and ``gamma`` are the ends divided by those weights.
        """
        weight_OGg = self.weight.detach().reshape(*self.scale.shape, -1)
        self._ends = weight_OGg.amin(-1).clamp_(max=0), weight_OGg.amax(-1).clamp_(min=0)
        low = -self.zero_point.detach() * self.scale.detach()
        self.low = nn.Parameter(low)
        self.high = nn.Parameter(low + self.grid.top * self.scale.detach())
        self.project()
        return self.low, self.high

    def _range(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, ``[O, G]``."""
        if self.low is None or self.high is None:
            return self.scale, self.zero_point
        scale = (self.high - self.low) / self.grid.top
        return scale, -self.low / scale

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor | None = self.quantized
        if weight is None:
            function = fake_quantize_steps if self.in_steps else fake_quantize
            weight = function(self.weight, *self._range(), self.grid.bits)
        elif self._announces is not None:
            weight = announced(weight, *self._announces)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        if not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        return functional.linear(x, weight, bias)

    @torch.no_grad()
    def project(self) -> None:
        """Bring what is trained back into its domain after an optimizer step; twice is as good as once."""
        if self.low is not None and self.high is not None and self._ends is not None:
            least, most = self._ends
            self.low.copy_(torch.minimum(torch.maximum(self.low, least), torch.zeros_like(least)))
            self.high.copy_(torch.maximum(torch.minimum(self.high, most), torch.zeros_like(most)))
            self.high.copy_(torch.maximum(self.high, self.low + self.grid.top * self.scale_floor))
            for parameter, value in zip((self.scale, self.zero_point), self._range(), strict=True):
                parameter.copy_(value)
        self.scale.copy_(into_domain(self.scale, self.scale_floor))
        self.zero_point.clamp_(0, self.grid.top)
        if self._started is not None:
            half = (self.scale.abs() / 2).unsqueeze(-1)
            started = self._started.reshape(*self.scale.shape, -1)
            weight_OGg = self.weight.view(*self.scale.shape, -1)
            weight_OGg.copy_(torch.minimum(torch.maximum(weight_OGg, started - half), started + half))

    @torch.no_grad()
    def keep_sides(self) -> None:
        """Each scale on the side of zero where it is, after values that were kept have come in: those of
        versions that turned no groups round began on another one."""
        self.scale_floor.copy_(torch.copysign(self.scale_floor, self.scale))

    @torch.no_grad()
    def freeze(self) -> PackedWeight:
        """Round to the grid, once.

        The scale is rounded to float16 before the integers are chosen, so that each weight goes to the
        nearest value that the saved file can express.
        """
        scale = stored_scale(self.scale).float()
        zero = self.zero_point.round()
        # Counted in steps, a weight has the scale 1.
        unit = torch.ones_like(scale) if self.in_steps else scale
        codes = quantize(self.weight, unit, zero, self.grid.bits)
        return PackedWeight.from_codes(codes, scale, zero, self.grid)

    @torch.no_grad()
    def kept_latent(self, form: Downcast) -> Tensor:
        """What :meth:`freeze` rounds, the weight counted in steps of the scale that is stored, in ``form``,
        on the CPU."""
        steps = self.weight if self.in_steps else steps_of(self.weight, stored_scale(self.scale))
        return downcast(steps, self.zero_point.round(), self.grid, form).cpu()


def steps_of(weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """A weight counted in grid steps, float32."""
    grouped = weight_OI.float().reshape(*scale_OG.shape, -1) / scale_OG.float().unsqueeze(-1)
    return grouped.reshape(weight_OI.shape)


def wrap_linears(
    block: nn.Module,
    grids: Mapping[str, Grid],
    *,
    method: Literal["minmax", "search"] = "search",
    norm: float = 2.5,
    ranges: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, FakeQuantLinear]:
    """Replace the named linears of a block by fake-quantized ones, each on its grid; returns them by name.

    ``method`` and ``norm`` are those of :func:`~engine.quant.grid.initial_range`; ``ranges`` are each
    linear's scale and zero point instead.
    """
    wrapped: dict[str, FakeQuantLinear] = {}
    for slot in slots(block, grids):
        grid, found = grids[slot.name], slot.linear()
        if ranges is None:
            linear = FakeQuantLinear.of_linear(found, grid, method=method, norm=norm)
        else:
            linear = FakeQuantLinear(found.weight.detach().float(), *ranges[slot.name], grid, found.bias)
        wrapped[slot.name] = linear
        slot.set(linear)
    return wrapped


def latent_linears(
    block: nn.Module, packed: PackedBlock, latents: Mapping[str, Tensor] | None = None
) -> dict[str, FakeQuantLinear]:
    """Give a block what ``packed`` has, its linears as :meth:`FakeQuantLinear.of_packed`, with their latents
    where there are such; returns them by name."""
    packed.install(block)
    linears: dict[str, FakeQuantLinear] = {}
    for slot in slots(block, packed.linears):
        linear = slot.get()
        assert isinstance(linear, PackedLinear), slot.name
        latent = None if latents is None else latents.get(slot.name)
        linears[slot.name] = FakeQuantLinear.of_packed(linear.packed(), linear.bias, latent)
        slot.set(linears[slot.name])
    return linears


def freeze_block(block: nn.Module, linears: dict[str, FakeQuantLinear]) -> PackedBlock:
    """Round a trained block to the grid; its other parameters stay as they are (an export rounds them to what
    it stores, :mod:`engine.export.stored`), but for trained ones, which go to float16 with the scales."""
    inner = {f"{name}.{part}" for name in linears for part in TRAINED}
    others = {name: _kept(parameter) for name, parameter in block.named_parameters() if name not in inner}
    return PackedBlock({name: linear.freeze() for name, linear in linears.items()}, others)


def _kept(parameter: nn.Parameter) -> Tensor:
    """A parameter in float16 where that loses nothing, or where it was trained and fits."""
    value = parameter.detach()
    if parameter.requires_grad:
        return kept_norm(value)
    half = value.to(torch.float16)
    return half if torch.equal(half.to(value.dtype), value) else value


def kept_norm(value: Tensor) -> Tensor:
    """What was trained beside the linears, in float16 like the scales where it fits."""
    half = value.to(torch.float16)
    return half if bool(half.isfinite().all()) else value
