"""What Block-AP minimises for one block: the distance between what the fake-quantized block makes of the
quantized stream and what the original block made of the full-precision one.

This is the plain form: forward and backward are torch's, quantizer included. It runs everywhere and is what
:mod:`engine.methods.blockwise.fast_reconstruction` is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.data.prefetch import Prefetcher, Rows
from engine.quant.fake_linear import FakeQuantLinear, wrap_linears
from engine.training.loop import Method
from engine.training.precision import autocast
from engine.training.stepper import ParameterGroup
from engine.training.world import ALONE, World

if TYPE_CHECKING:
    from engine.data.activations import ActivationStore
    from engine.models.causal_lm import CausalLM

# Training sequences on which a block's loss is reported before and after: enough to be steady, few enough to
# be free, so fewer where few are trained on.
REPORT_SEQUENCES = 16
REPORT_SHARE = 8


@dataclass(frozen=True)
class Streams:
    """The two activation streams ``[N, T, H]``: ``train`` training sequences, then the validation
    sequences. With several ranks the stores hold those that lie here."""

    full: ActivationStore
    quantized: ActivationStore
    train: int
    """Of all ranks."""
    world: World = ALONE

    @property
    def sequences(self) -> int:
        """That lie here."""
        return self.full.shape[0]

    def here(self, count: int) -> int:
        """How many of the first ``count`` sequences lie here."""
        return len(self.world.share(count))


def reconstruction_loss(
    block: nn.Module,
    hidden: Tensor,
    arguments: dict[str, Any],
    target: Tensor,
    kind: str,
    *,
    drop: float = 0.0,
) -> Tensor:
    """Distance between the block's output for ``hidden`` ``[B, T, H]`` and ``target``, a float32 scalar;
    this fraction of the squared errors, the largest, are left out.

    It is called inside of autocast: what enters that itself is compiled anew in every process, since torch
    keeps nothing of it (_functorch/_aot_autograd/autograd_cache.py, "Unsupported call_function target").
    """
    output = block(hidden, **arguments)
    output = output[0] if isinstance(output, tuple) else output
    return distance_without_largest(output, target, kind, drop) if drop else distance(output, target, kind)


def distance(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """Reconstruction loss of a batch ``[B, T, H]``, a float32 scalar."""
    target = target.float()
    squared = (output.float() - target).square().mean(-1)
    if kind == "token_relative_mse":
        squared = squared / target.square().mean(-1).clamp_(min=1e-12)
    return squared.mean()


def distance_without_largest(output: Tensor, target: Tensor, kind: str, drop: float) -> Tensor:
    """The same mean over all errors but the largest; how many these are follows from the shape, so that the
    step can be recorded. Errors that are not finite are kept: a training that diverges must show."""
    target = target.float()
    squared = (output.float() - target).square()
    if kind == "token_relative_mse":
        squared = squared / target.square().mean(-1, keepdim=True).clamp_(min=1e-12)
    dropped = math.ceil(drop * squared.numel())
    least = squared.detach().flatten().topk(dropped, sorted=False).values.amin()
    left_out = (squared >= least) & (squared < torch.inf)
    return torch.where(left_out, 0.0, squared).sum() / (squared.numel() - dropped)


class Reconstruction(Method):
    """A block with fake-quantized linears, measured against its own output at full precision."""

    def __init__(
        self,
        lm: CausalLM,
        index: int,
        block: nn.Module,
        streams: Streams,
        config: BlockAPConfig,
        grid: GridConfig,
        dtype: torch.dtype,
        *,
        ranges: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """``ranges`` are where the linears' grids start, if not where the grid's own method puts them."""
        self.lm, self.index, self.block, self.streams = lm, index, block, streams
        self.config, self.dtype = config, dtype
        grids = grid.of_each(lm.linear_names(index))
        self.linears = wrap_linears(block, grids, method=grid.range, norm=grid.search_norm, ranges=ranges)
        self.groups = _parameter_groups(block, self.linears, config)
        self.poll: Callable[[], None] = lambda: None
        self.train_loss: Callable[..., Tensor] = reconstruction_loss
        """What the steps minimise; compiled where that pays. Reports and validations stay plain."""
        self.prefetch = Prefetcher((streams.quantized, streams.full))

    def loss(self, rows: Rows) -> Tensor:
        """As it is reported and validated."""
        return self._measure(self.prefetch.read(rows), reconstruction_loss)

    def training_loss(self, tensors: Sequence[Tensor], function: Callable[..., Tensor]) -> Tensor:
        """As the steps minimise it, of what the streams hold of a batch, by :func:`reconstruction_loss` in
        one form or another."""
        options = {"drop": self.config.drop_largest} if self.config.drop_largest else {}
        return self._measure(tensors, function, **options)

    def _measure(self, tensors: Sequence[Tensor], function: Callable[..., Tensor], **options: Any) -> Tensor:
        hidden, target = tensors
        batch, length = hidden.shape[:2]
        arguments = self.lm.block_kwargs(self.index, batch, length, hidden.dtype)
        with autocast(hidden.device, self.dtype):
            return function(self.block, hidden, arguments, target, self.config.loss, **options)

    def micro_step(self, rows: Tensor, weight: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
        tensors = self.prefetch.read(self.places(rows))
        loss = self.training_loss(tensors, self.train_loss) * weight
        scale(loss).backward()
        return loss.detach()

    def upcoming(self, rows: Tensor) -> None:
        self.prefetch.expect(self.places(rows))

    def places(self, rows: Tensor) -> Tensor:
        """Where training sequences lie in the streams."""
        return self.streams.world.places(rows)

    def close(self) -> None:
        """Give back what only training needs."""
        self.prefetch.close()

    def project(self) -> None:
        for linear in self.linears.values():
            linear.project()

    def refresh(self) -> None:
        """Ends of ranges that were put back bring their scales and zero points with them."""
        for linear in self.linears.values():
            if linear.low is not None:
                linear.project()

    def validate(self, micro_batch: int) -> float | None:
        if not self.validated():
            return None
        streams = self.streams
        return self.mean_loss(streams.here(streams.train), streams.sequences, micro_batch)

    def validated(self) -> int:
        return self.streams.sequences - self.streams.here(self.streams.train)

    def report_loss(self, micro_batch: int) -> float:
        """Mean loss over the first training sequences, those of them that lie here."""
        return self.mean_loss(0, self.reported(), micro_batch) if self.reported() else 0.0

    def reported(self) -> int:
        """How many of them lie here."""
        train = self.streams.train
        count = min(REPORT_SEQUENCES, max(math.ceil(train / REPORT_SHARE), 4), train)
        return self.streams.here(count)

    @torch.no_grad()
    def mean_loss(self, first: int, last: int, micro_batch: int) -> float:
        """Mean loss over sequences ``first`` to ``last`` of those that lie here."""
        total = torch.zeros((), dtype=torch.float64, device=self.lm.device)
        parts = [range(a, min(a + micro_batch, last)) for a in range(first, last, micro_batch)]
        for rows, following in zip_longest(parts, parts[1:]):
            self.poll()
            total += self.loss(rows).double() * len(rows)
            if following is not None:
                self.prefetch.expect(following)
        return total.item() / (last - first)


def _parameter_groups(
    block: nn.Module, linears: dict[str, FakeQuantLinear], config: BlockAPConfig
) -> list[ParameterGroup]:
    """What is trained, at which learning rate; marks it as requiring gradients.

    A relative learning rate is a fraction of one grid step: Adam moves a parameter by about its learning rate
    per step, and what matters to a quantized weight is how many steps it takes to cross into the next
    integer.
    """
    assert config.lr_weight is not None, "the configuration is not resolved"
    assert config.lr_quant is not None, "the configuration is not resolved"
    relative = config.lr_scaling == "relative"
    groups: list[ParameterGroup] = []

    def add(kind: str, parameter: nn.Parameter, lr: float) -> None:
        parameter.requires_grad_(True)
        groups.append(ParameterGroup(kind, [parameter], lr))

    for linear in linears.values():
        unit = linear.scale.abs().mean().item() if relative else 1.0
        if "weights" in config.train:
            add("weights", linear.weight, config.lr_weight * unit)
        elif "rounding" in config.train:
            add("rounding", linear.only_round(), config.lr_weight * unit)
        if "clipping" in config.train and linear.grid.fixed_zero_point is None:
            for end in linear.only_clip():
                add("clipping", end, config.lr_quant * unit)
        if "scales" in config.train:
            add("scales", linear.scale, config.lr_quant * unit)
        if "zero_points" in config.train and linear.grid.fixed_zero_point is None:
            # A zero point is counted in grid steps already.
            add("zero_points", linear.zero_point, config.lr_quant)
    if "norms" in config.train:
        inner = {id(p) for linear in linears.values() for p in linear.parameters()}
        for name, parameter in block.named_parameters():
            if id(parameter) not in inner and parameter.ndim == 1 and not name.endswith("bias"):
                unit = parameter.abs().mean().item() if relative else 1.0
                lr = config.lr_quant * unit if relative else config.lr_weight
                add("norms", parameter, lr)
    return _merge(groups)


def _merge(groups: list[ParameterGroup]) -> list[ParameterGroup]:
    """Join groups of the same kind and learning rate, so that the fused optimizer launches fewer kernels."""
    merged: dict[tuple[str, float], list[nn.Parameter]] = {}
    for group in groups:
        merged.setdefault((group.kind, group.lr), []).extend(group.parameters)
    return [ParameterGroup(kind, parameters, lr) for (kind, lr), parameters in merged.items()]
