"""E2E-QAT: end-to-end training of the weights behind the integers, and of their grid.

What E2E-QP cannot do is to change an integer. Here every weight has a float32 latent again, which is rounded
to the grid in the forward pass and moved by straight-through gradients, through all blocks at once
(:mod:`engine.methods.network.network`).

A latent is counted in grid steps (:func:`engine.quant.grid.fake_quantize_steps`) and starts at its integer,
in the middle of what is rounded to it. So an integer changes once many steps agree about it, and scales are
trained beside it as E2E-QP trains them: their gradient is that of the whole weight, and a scale that moves
changes no integer. (Latents in the weights' own unit, and those that Block-AP ended with, are worse than
E2E-QP alone on the models that were tried: benchmarks/README.md.) Where blocks were only rounded it can start
at the original weights, which with the norms beside them is full quantization-aware training.

Memory: 12 bytes a weight for latents and AdamW's moments, and on a GPU 4 for the quantized weight and its
gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.config.e2e_qat import E2EQATConfig
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
from engine.training.loop import Settings
from engine.training.progress import Keeper, Progress
from engine.training.snapshot import Snapshot
from engine.training.stepper import ParameterGroup, Stepper
from engine.training.world import ALONE, World

if TYPE_CHECKING:
    from engine.methods.blockwise.fused import FusedStepper
    from engine.models.causal_lm import CausalLM

WHERE = "e2e_qat"
"""For messages."""
BETAS = (0.9, 0.95)
"""AdamW's rates of forgetting: a second moment of the last twenty steps rather than of a thousand, which a
training of some hundred steps never gets to know."""


def train_weights(
    lm: CausalLM,
    blocks: list[nn.Module],
    data: NetworkData,
    config: E2EQATConfig,
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
    fast: bool = False,
) -> NetworkResult:
    """Train ``blocks`` (whose linears are :class:`FakeQuantLinear`, on the device) in place.

    The arguments are those of :func:`~engine.methods.network.e2e_qp.train_scales`; ``fast`` takes AdamW's
    step, the way back through the quantizer and the new quantized weights in one kernel a linear, which needs
    a device on which Triton works.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    kind = _FastWeights if fast else _Weights
    network = kind(lm, blocks, data, config, dtype, recompute=recompute)
    network.hasten(progress, WHERE, compiles=compiles, records=records)
    settings = network_settings(
        config, lm.device, seed=seed, dtype=dtype, where=WHERE, world=world, betas=BETAS
    )
    result = train_network(network, settings, progress, snapshot, keeper)
    refuse_runaway((linear.scale for linear in network.linears), result.steps, WHERE)
    network.close()
    return result


class _Weights(Network):
    """Weights, scales and zero points of all blocks, by torch's own kernels."""

    def __init__(
        self,
        lm: CausalLM,
        blocks: list[nn.Module],
        data: NetworkData,
        config: E2EQATConfig,
        dtype: torch.dtype,
        *,
        recompute: bool,
    ) -> None:
        super().__init__(lm, blocks, data, dtype, recompute=recompute, text_weight=config.text_weight)
        self.linears = [m for block in blocks for m in block.modules() if isinstance(m, FakeQuantLinear)]
        self.groups = _parameter_groups(blocks, self.linears, config)

    def project(self) -> None:
        for linear in self.linears:
            linear.project()

    def close(self) -> None:
        """Give back what only training needs."""
        for linear in self.linears:
            linear.quantized = None


class _FastWeights(_Weights):
    """The same, the quantized weights tensors of their own (:mod:`engine.methods.blockwise.fused`)."""

    _stepper: FusedStepper

    def make_stepper(self, settings: Settings) -> Stepper:
        from engine.methods.blockwise.fused import FusedStepper

        for linear in self.linears:
            if linear.quantized is None:
                linear.keep_quantized(self.dtype)
        self._stepper = FusedStepper(
            self.groups,
            self.linears,
            weight_decay=settings.weight_decay,
            device=settings.device,
            dtype=settings.dtype,
            on_failure=self._told or (lambda why: None),
            betas=settings.betas,
            world=settings.world,
        )
        self._stepper.requantize()
        return self._stepper

    def _begin(self, micro_batch: int, share: int) -> None:
        super()._begin(micro_batch, share)
        self._sums: list[Tensor] = []
        """Gradients of the micro-batches so far, float32; empty where a batch passes at once."""

    @property
    def leaves(self) -> list[Tensor]:
        quantized = [linear.quantized for linear in self.linears if linear.quantized is not None]
        return [*quantized, *self._stepper.others]

    def add(self, gradients: tuple[Tensor, ...], weight: float, *, fixed: bool) -> None:
        stepper = self._stepper
        if weight < 1:
            if not self._sums:
                self._sums = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in self.leaves]
                stepper.sums_up = True
            torch._foreach_add_(self._sums, list(gradients))
            stepper.gradients, stepper.fixed = self._sums, True
        elif fixed or not stepper.fixed:
            stepper.gradients, stepper.fixed = [g.contiguous() for g in gradients], fixed
        else:
            # A batch of another size: to where the recorded step looks for them.
            torch._foreach_copy_(list(stepper.gradients), list(gradients))

    def project(self) -> None:
        """The kernels have done it."""

    def refresh(self) -> None:
        self._stepper.requantize()


def _parameter_groups(
    blocks: list[nn.Module], linears: Iterable[FakeQuantLinear], config: E2EQATConfig
) -> list[ParameterGroup]:
    """What is trained, at rates relative to each linear's grid steps."""
    assert config.lr_weight is not None, "the configuration is not resolved"
    assert config.lr_quant is not None, "the configuration is not resolved"
    groups: list[ParameterGroup] = []

    def add(kind: str, parameter: nn.Parameter, lr: float) -> None:
        parameter.requires_grad_(True)
        groups.append(ParameterGroup(kind, [parameter], lr))

    for linear in linears:
        unit = linear.scale.abs().mean().item() if config.lr_scaling == "relative" else 1.0
        if "weights" in config.train:
            # Counted in grid steps already, like a zero point.
            add("weights", linear.weight, config.lr_weight)
        if "scales" in config.train:
            add("scales", linear.scale, config.lr_quant * unit)
        if "zero_points" in config.train and linear.grid.fixed_zero_point is None:
            add("zero_points", linear.zero_point, config.lr_quant)
    if "norms" in config.train:
        for block in blocks:
            groups += norm_groups(block, config.lr_quant, relative=config.lr_scaling == "relative")
    return groups
