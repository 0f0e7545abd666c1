"""The stages that train all blocks together: ``e2e_qp``, scales on integers that stay, ``e2e_qat``, integers
and scales, and ``lr_qat``, the same by factors of low rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from engine import telemetry
from engine.checkpoints.snapshots import SnapshotKeeper, resumable
from engine.config.latents import Start
from engine.config.stages import STAGES, Stage
from engine.methods.network.e2e_qat import train_weights
from engine.methods.network.e2e_qp import train_scales
from engine.methods.network.lr_qat import low_rank_linears, train_factors
from engine.methods.network.network import NetworkData, NetworkResult
from engine.methods.network.norms import trained_norms
from engine.phases.job import Job, compute_dtype
from engine.phases.kernels import switch_on_low_rank_kernel
from engine.phases.latents import latents
from engine.phases.passage import forget_streams
from engine.phases.teacher import is_taught, teacher
from engine.quant.fake_linear import FakeQuantLinear, kept_norm, latent_linears
from engine.quant.packed import Kernels, PackedLinear, PackedWeight
from engine.quant.slots import slots
from engine.run.facts import done_fact, stage_entry

RATES = ("lr", "lr_weight", "lr_factors", "lr_quant")
"""Fields of a section that are learning rates."""


def train_end_to_end(job: Job) -> None:
    """Train and commit scales, and norms. What teaches is closed in the end: ``job.full``, where that is
    kept."""
    stage = STAGES["e2e_qp"]
    if job.is_done(stage):
        return
    config = msgspec.structs.replace(job.config.e2e_qp, micro_batch_size=job.micro_batch(stage))
    dtype = compute_dtype(config.compute_dtype, job.device)
    with _data(job, stage) as data:
        blocks = []
        for index in range(job.blocks):
            blocks.append(job.packed(index).install(job.lm.load_block(index, dtype=dtype)))
            job.report.leave_if_asked()
        telemetry.release_memory()
        with resumable(job.checkpoints, stage.name) as keeper:
            arguments = _arguments(job, stage, keeper)
            result = train_scales(job.lm, blocks, data, config, dtype=dtype, **arguments)
    _say_if_in_vain(job, stage, result)
    trained = [_packed(block, job.lm.linear_names(index)) for index, block in enumerate(blocks)]
    _commit(job, stage, _renewed(blocks, trained, "scale", "zero_point"))


def train_weights_end_to_end(job: Job) -> None:
    """Train and commit integers and scales."""
    stage = STAGES["e2e_qat"]
    if job.is_done(stage):
        return
    config = msgspec.structs.replace(job.config.e2e_qat, micro_batch_size=job.micro_batch(stage))
    dtype = compute_dtype(config.compute_dtype, job.device)
    with _data(job, stage) as data:
        blocks, linears = [], []
        for block, named in _latent_blocks(job, config.start, dtype):
            blocks.append(block)
            linears.append(named)
        telemetry.release_memory()
        fast = Kernels.on and job.takes_kernels and not config.grad_clip
        with resumable(job.checkpoints, stage.name) as keeper:
            arguments = _arguments(job, stage, keeper)
            result = train_weights(job.lm, blocks, data, config, dtype=dtype, fast=fast, **arguments)
    _say_if_in_vain(job, stage, result)
    trained = [{name: linear.freeze() for name, linear in of_block.items()} for of_block in linears]
    _commit(job, stage, _renewed(blocks, trained, "words", "scale", "zero_point"))


def train_low_rank_end_to_end(job: Job) -> None:
    """Train and commit integers and scales, by factors of low rank, which are merged."""
    stage = STAGES["lr_qat"]
    if job.is_done(stage):
        return
    config = msgspec.structs.replace(job.config.lr_qat, micro_batch_size=job.micro_batch(stage))
    switch_on_low_rank_kernel(job)
    dtype = compute_dtype(config.compute_dtype, job.device)
    with _data(job, stage) as data:
        blocks: list[nn.Module] = []
        linears = []
        # The integer form holds nothing of what lies behind the integers.
        start = "integers" if config.downcast == "integer" else config.start
        for block, named in _latent_blocks(job, start, dtype):
            seed = job.network_seed(stage) * job.blocks + len(blocks)
            linears.append(low_rank_linears(block, named, config, seed))
            blocks.append(block)
        telemetry.release_memory()
        with resumable(job.checkpoints, stage.name) as keeper:
            arguments = _arguments(job, stage, keeper)
            result = train_factors(job.lm, blocks, data, config, dtype=dtype, **arguments)
    _say_if_in_vain(job, stage, result)
    trained = [{name: linear.freeze() for name, linear in of_block.items()} for of_block in linears]
    _commit(job, stage, _renewed(blocks, trained, "words", "scale", "zero_point"))


def _say_if_in_vain(job: Job, stage: Stage, result: NetworkResult) -> None:
    """Where the start was validated best, the perplexity does not move, which would look like a fault."""
    best, began = result.val_loss, result.initial_loss
    if best is None or began is None or not best >= began or not result.steps:
        return  # a start that was no number is not kept
    section = getattr(job.config, stage.name)
    rates = " and ".join(f"{stage.name}.{name}" for name in RATES if hasattr(section, name))
    job.report.warning(
        "in_vain",
        f"{stage.label} was never better than where it began, on {section.val_sequences} sequences for "
        f"validation (loss {began:.4g}), so what it began with is kept",
        hint=f"lower {rates}, or raise {stage.name}.sequences or {stage.name}.val_sequences",
    )


def _latent_blocks(
    job: Job, start: Start, dtype: torch.dtype
) -> Iterator[tuple[nn.Module, dict[str, FakeQuantLinear]]]:
    """Each block on the device, its linears' weights counted in grid steps, and these by name."""
    without = 0
    for index in range(job.blocks):
        found = latents(job, index) if start == "latents" else None
        without += start == "latents" and found is None
        block = job.lm.load_block(index, dtype=dtype)
        yield block, latent_linears(block, job.packed(index), found)
        job.report.leave_if_asked()
    if without:
        job.report.warning(
            "latents",
            f"{without} of {job.blocks} blocks came without the latents behind their integers, and start at "
            "these, from which little moves",
            hint="blocks that this run rounds to nearest, or makes by Block-AP or GPTQ, have them",
        )


def _renewed(
    blocks: Sequence[nn.Module], trained: Sequence[Mapping[str, PackedWeight]], *parts: str
) -> list[dict[str, Tensor]]:
    """What is new of each block: these parts of its linears, and the norms that were trained."""
    entries = []
    for block, weights in zip(blocks, trained, strict=True):
        norms = {f"other.{name}": kept_norm(value).cpu() for name, value in trained_norms(block).items()}
        entries.append(_entry(weights, *parts) | norms)
    return entries


@contextmanager
def _data(job: Job, stage: Stage) -> Iterator[NetworkData]:
    """The stage's text, and what teaches it, which is closed in the end."""
    text = job.tokens.of(stage.name)
    taught = teacher(job, stage) if is_taught(job, stage) else None
    try:
        yield NetworkData(text.tokens_NT, text.train, taught, text.answers, job.world)
    finally:
        if taught is not None:
            taught.close()


def _arguments(job: Job, stage: Stage, keeper: SnapshotKeeper) -> dict[str, Any]:
    """What every training of the whole network is told of the run."""
    return {
        "seed": job.network_seed(stage),
        "progress": job.report,
        "snapshot": keeper.snapshot,
        "keeper": keeper,
        "world": job.world,
        "recompute": job.plan.recomputes,
        "compiles": job.plan.compiles_e2e,
        "records": job.takes_kernels,
    }


def _commit(job: Job, stage: Stage, blocks: Sequence[Mapping[str, Tensor]]) -> None:
    """Publish what was trained, block by block."""
    forget_streams(job)
    job.store.remember(done_fact(stage), True)
    entries = {stage_entry(stage, index): trained for index, trained in enumerate(blocks)}
    job.checkpoints.commit(stage.name, entries=entries)


def _packed(block: nn.Module, names: Iterable[str]) -> dict[str, PackedWeight]:
    """The weights of a block's packed linears as they are now."""
    found: dict[str, PackedWeight] = {}
    for slot in slots(block, names):
        linear = slot.get()
        assert isinstance(linear, PackedLinear), slot.name
        found[slot.name] = linear.packed()
    return found


def _entry(weights: Mapping[str, PackedWeight], *parts: str) -> dict[str, Tensor]:
    """What was trained of a block's linears, on the CPU."""
    tensors = {f"{name}.{part}": getattr(weight, part) for name, weight in weights.items() for part in parts}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
