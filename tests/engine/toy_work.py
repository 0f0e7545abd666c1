"""What the toy methods do, each with what the engine has for every method: the loop, its snapshots, the loss
of the whole network, the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.snapshots import resumable
from engine.config.stages import STAGES
from engine.methods.network.network import Network, NetworkData, train_network
from engine.phases.job import Job
from engine.quant.fake_linear import FakeQuantLinear, freeze_block, wrap_linears
from engine.quant.grid import fake_quantize
from engine.quant.packed import PackedLinear
from engine.run.facts import block_entry, done_fact, losses_fact, stage_entry
from engine.training.loop import Method, Settings, Training
from engine.training.stepper import ParameterGroup


def make_blocks(job: Job) -> None:
    """Fit the scales of every block to its weights, and round."""
    stage, config = STAGES["toy_block"], job.config.toy_block
    for index in range(job.blocks):
        job.report.block_started(index, job.blocks)
        if job.is_finished(index):
            job.report.block_finished(**(job.store.fact(losses_fact(index)) or {}), restored=True)
            continue
        block = job.lm.load_block(index, dtype=torch.float32)
        linears = wrap_linears(block, job.config.grid.of_each(job.lm.linear_names(index)), method="minmax")
        fit = Fit(linears)
        settings = _settings(job, f"toy block {index}", job.seed(index), batch=1, epochs=1, tokens=1)
        with resumable(job.checkpoints, stage.name, index) as keeper:
            Training(fit, config.steps, settings, job.report, keeper.snapshot, keeper).run()
        losses: dict[str, Any] = {"initial_loss": fit.first, "final_loss": fit.loss().item()}
        job.store.remember(losses_fact(index), losses)
        entries = {block_entry(index): freeze_block(block, linears).tensors()}
        job.checkpoints.commit(stage.name, index, entries)
        job.report.block_finished(**losses)
        job.report.leave_if_asked()


class Fit(Method):
    """The distance of the quantized weights from the original ones, by the scales alone."""

    def __init__(self, linears: dict[str, FakeQuantLinear]) -> None:
        self.linears = list(linears.values())
        scales = [linear.scale.requires_grad_(True) for linear in self.linears]
        self.groups = [ParameterGroup("scales", scales, 1e-4)]
        self.first = self.loss().item()

    def loss(self) -> Tensor:
        total = torch.zeros(())
        for linear in self.linears:
            rounded = fake_quantize(linear.weight, linear.scale, linear.zero_point, linear.grid.bits)
            total = total + (rounded - linear.weight.detach()).square().mean()
        return total

    def micro_step(self, rows: Tensor, weight: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
        # So that the order of the rows, which a resumed training has to keep, decides about the result.
        loss = self.loss() * weight * (1 + rows.float().mean())
        scale(loss).backward()
        return loss.detach()

    def project(self) -> None:
        for linear in self.linears:
            linear.project()

    def validate(self, micro_batch: int) -> float | None:
        return None


def train_network_scales(job: Job) -> None:
    """Train the scales of all blocks on what the model predicts."""
    stage, config = STAGES["toy_network"], job.config.toy_network
    if job.is_done(stage):
        return
    text = job.tokens.of(stage.name)
    blocks = [
        job.packed(index).install(job.lm.load_block(index, dtype=torch.float32))
        for index in range(job.blocks)
    ]
    scales = Scales(job.lm, blocks, NetworkData(text.tokens_NT, text.train, None), torch.float32)
    settings = _settings(
        job,
        stage.name,
        job.network_seed(stage),
        batch=config.batch_size,
        epochs=config.epochs,
        tokens=config.sequence_length,
    )
    with resumable(job.checkpoints, stage.name) as keeper:
        train_network(scales, settings, job.report, keeper.snapshot, keeper)
    job.store.remember(done_fact(stage), True)
    entries = {stage_entry(stage, index): _trained(block) for index, block in enumerate(blocks)}
    job.checkpoints.commit(stage.name, entries=entries)


class Scales(Network):
    """All blocks, of which the scales are trained."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.layers = [m for block in self.blocks for m in block.modules() if isinstance(m, PackedLinear)]
        scales = [layer.scale.requires_grad_(True) for layer in self.layers]
        self.groups = [ParameterGroup("scales", scales, 1e-5)]

    @torch.no_grad()
    def project(self) -> None:
        for layer in self.layers:
            layer.scale.clamp_(min=1e-6)


def _trained(block: torch.nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.scale": layer.packed().scale.detach().contiguous()
        for name, layer in block.named_modules()
        if isinstance(layer, PackedLinear)
    }


def _settings(job: Job, where: str, seed: int, *, batch: int, epochs: int, tokens: int) -> Settings:
    return Settings(
        epochs=epochs,
        batch_size=batch,
        micro_batch=1,
        weight_decay=0.0,
        grad_clip=0.0,
        lr_final_fraction=0.1,
        patience=0,
        seed=seed,
        device=job.device,
        dtype=torch.float32,
        where=where,
        tokens_per_sequence=tokens,
    )
