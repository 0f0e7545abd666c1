"""LR-QAT: low-rank quantization-aware training (arXiv 2406.06385).

Integers of the whole network may change, as in E2E-QAT, without a float32 master of every weight: the latents
that they are rounded from are frozen in 1 or 2 bytes each, and what is trained is a product of two thin
factors that is added to them before they are rounded, beside the scales
(:class:`engine.quant.low_rank.LowRankLinear`).

Frozen latents are where weights lie between two integers, so a small change moves those near a border first.
Started at the integers themselves, the change would have to grow to half a grid step before it moved
anything.

Memory: a frozen latent (1 byte in fixed point), and per linear ``r (O + I)`` factors with gradients and
moments; nothing else of the size of the weights outlives a linear's call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.config.lr_qat import LRQATConfig
from engine.methods.network.e2e_qat import BETAS
from engine.methods.network.network import (
    Network,
    NetworkData,
    NetworkResult,
    network_settings,
    train_network,
)
from engine.methods.network.norms import norm_groups
from engine.methods.runaway import refuse_runaway
from engine.quant.fake_linear import FakeQuantLinear
from engine.quant.low_rank import LowRank, LowRankLinear
from engine.quant.packed import Domain
from engine.quant.slots import slots
from engine.training.progress import Keeper, Progress
from engine.training.snapshot import Snapshot
from engine.training.stepper import ParameterGroup
from engine.training.world import ALONE, World

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

WHERE = "lr_qat"
"""For messages."""
SEEDS = 2**63
"""Below which a seed has to be."""


def low_rank_linears(
    block: nn.Module, linears: dict[str, FakeQuantLinear], config: LRQATConfig, seed: int
) -> dict[str, LowRankLinear]:
    """Replace a block's ``linears``, whose weights are counted in grid steps, by low-rank ones that begin as
    they do; returns these by name. ``seed`` is the block's own."""
    how = LowRank(
        rank=config.rank,
        alpha=config.alpha,
        form=config.downcast,
        zero_factor=config.zero_factor,
        start=config.factor_start,
        dtype=getattr(torch, config.factor_dtype),
    )
    replaced: dict[str, LowRankLinear] = {}
    for place, slot in enumerate(slots(block, linears)):
        own = (seed * 1_000_003 + place) % SEEDS
        replaced[slot.name] = LowRankLinear(linears[slot.name], how, own)
        slot.set(replaced[slot.name])
    return replaced


def train_factors(
    lm: CausalLM,
    blocks: list[nn.Module],
    data: NetworkData,
    config: LRQATConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    progress: Progress,
    snapshot: Snapshot | None = None,
    keeper: Keeper | None = None,
    world: World = ALONE,
    recompute: bool = True,
    compiles: bool = False,
    records: bool = False,
) -> NetworkResult:
    """Train ``blocks`` (whose linears are :class:`LowRankLinear`, on the device) in place.

    The arguments are those of :func:`~engine.methods.network.e2e_qp.train_scales`. Compiled are only blocks
    whose weights are made by kernels: what torch's own operations make, a compiler may keep for the backward
    pass, where it is to be computed again.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    network = _Factors(lm, blocks, data, config, dtype, recompute=recompute)
    by_kernel = all(linear.by_kernel for linear in network.linears)
    network.hasten(progress, WHERE, compiles=compiles and by_kernel, records=records)
    settings = network_settings(
        config,
        lm.device,
        seed=seed,
        dtype=dtype,
        where=WHERE,
        world=world,
        betas=BETAS,
        schedule=config.schedule,
    )
    result = train_network(network, settings, progress, snapshot, keeper)
    refuse_runaway((linear.scale for linear in network.linears), result.steps, WHERE)
    return result


class _Factors(Network):
    """Factors, scales, zero points and norms of all blocks."""

    def __init__(
        self,
        lm: CausalLM,
        blocks: list[nn.Module],
        data: NetworkData,
        config: LRQATConfig,
        dtype: torch.dtype,
        *,
        recompute: bool,
    ) -> None:
        super().__init__(lm, blocks, data, dtype, recompute=recompute, text_weight=config.text_weight)
        self.linears = [m for block in blocks for m in block.modules() if isinstance(m, LowRankLinear)]
        self.groups = _parameter_groups(blocks, self.linears, config)
        self._domain = Domain(
            [linear.scale for linear in self.linears],
            [linear.scale_floor for linear in self.linears],
            [linear.zero_point for linear in self.linears],
            [float(linear.grid.top) for linear in self.linears],
        )

    def project(self) -> None:
        """Bring scales and zero points back into their domain, so that what is trained can be saved."""
        self._domain.enter()


def _parameter_groups(
    blocks: list[nn.Module], linears: list[LowRankLinear], config: LRQATConfig
) -> list[ParameterGroup]:
    """What is trained: factors at one rate, since their product is counted in grid steps; the rest at rates
    relative to each linear's grid steps."""
    assert config.lr_factors is not None, "the configuration is not resolved"
    assert config.lr_quant is not None, "the configuration is not resolved"
    relative = config.lr_scaling == "relative"
    groups: list[ParameterGroup] = []

    def add(kind: str, lr: float, *parameters: nn.Parameter) -> None:
        for parameter in parameters:
            parameter.requires_grad_(True)
        groups.append(ParameterGroup(kind, list(parameters), lr))

    if "factors" in config.train:
        add("factors", config.lr_factors, *(factor for linear in linears for factor in (linear.a, linear.b)))
    for linear in linears:
        unit = linear.scale.abs().mean().item() if relative else 1.0
        if "scales" in config.train:
            add("scales", config.lr_quant * unit, linear.scale)
        if "zero_points" in config.train and linear.grid.fixed_zero_point is None:
            add("zero_points", config.lr_quant, linear.zero_point)
    if "norms" in config.train:
        for block in blocks:
            groups += norm_groups(block, config.lr_quant, relative=relative)
    return groups
