"""E2E-QP: end-to-end training of quantization parameters (EfficientQAT, arXiv 2407.11062, section 3.3).

Block-AP has made every block match its own target; nothing has looked at the whole network yet. Here the
integers are fixed and only the scales (optionally the zero points, and the norms between the linears) are
trained, through all blocks at once (:mod:`engine.methods.network.network`).

Memory: the weights stay packed (:class:`engine.quant.packed.PackedLinear` keeps no float copy).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.config.e2e_qp import E2EQPConfig
from engine.methods.network.network import (
    Network,
    NetworkData,
    NetworkResult,
    network_settings,
    train_network,
)
from engine.methods.network.norms import norm_groups
from engine.methods.runaway import refuse_runaway
from engine.quant.grid import RELATIVE_SCALE_FLOOR
from engine.quant.packed import Domain, PackedLinear, smallest_trained
from engine.training.progress import Keeper, Progress
from engine.training.snapshot import Snapshot
from engine.training.stepper import ParameterGroup
from engine.training.world import ALONE, World

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

WHERE = "e2e_qp"
"""For messages."""


def train_scales(
    lm: CausalLM,
    blocks: list[nn.Module],
    data: NetworkData,
    config: E2EQPConfig,
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
    """Train the quantization parameters inside ``blocks`` (packed decoder blocks, on the device), in place.

    ``snapshot`` is the state to continue from, ``keeper`` keeps such states; ``recompute`` computes each
    block's activations again in the backward pass instead of keeping them; ``compiles`` compiles the blocks'
    forward and backward, and the losses; ``records`` records them on a GPU, so that a micro-step is one
    launch.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    network = _Scales(lm, blocks, data, config, dtype, recompute=recompute)
    network.hasten(progress, WHERE, compiles=compiles, records=records)
    settings = network_settings(config, lm.device, seed=seed, dtype=dtype, where=WHERE, world=world)
    result = train_network(network, settings, progress, snapshot, keeper)
    refuse_runaway(network.scales, result.steps, WHERE)
    return result


class _Scales(Network):
    """The scales, and the zero points if they are trained, of all packed blocks."""

    def __init__(
        self,
        lm: CausalLM,
        blocks: list[nn.Module],
        data: NetworkData,
        config: E2EQPConfig,
        dtype: torch.dtype,
        *,
        recompute: bool,
    ) -> None:
        super().__init__(lm, blocks, data, dtype, recompute=recompute, text_weight=config.text_weight)
        self.groups = _parameter_groups(blocks, config)
        trained = {id(p) for group in self.groups for p in group.parameters}
        layers = [m for block in blocks for m in block.modules() if isinstance(m, PackedLinear)]
        self.scales = [layer.scale for layer in layers if id(layer.scale) in trained]
        zeros = [layer for layer in layers if layer.zero_point.is_floating_point()]
        floors = [smallest_trained(scale.detach(), RELATIVE_SCALE_FLOOR) for scale in self.scales]
        self._domain = Domain(
            self.scales, floors, [one.zero_point for one in zeros], [float(one.grid.top) for one in zeros]
        )

    def project(self) -> None:
        """Bring scales and zero points back into their domain, so that what is trained can be saved."""
        self._domain.enter()


def _parameter_groups(blocks: list[nn.Module], config: E2EQPConfig) -> list[ParameterGroup]:
    """Scales and zero points of every packed linear, and the norms; relative learning rates as in
    Block-AP."""
    assert config.lr is not None, "the configuration is not resolved"
    groups: list[ParameterGroup] = []
    relative = config.lr_scaling == "relative"
    for block in blocks:
        for module in block.modules():
            if not isinstance(module, PackedLinear):
                continue
            unit = module.scale.abs().mean().item() if relative else 1.0
            if "scales" in config.train:
                module.scale.requires_grad_(True)
                groups.append(ParameterGroup("scales", [module.scale], config.lr * unit))
            if "zero_points" in config.train and module.grid.fixed_zero_point is None:
                lr = config.lr
                groups.append(ParameterGroup("zero_points", [module.train_zero_points()], lr))
        if "norms" in config.train:
            groups += norm_groups(block, config.lr, relative=relative)
    return groups
