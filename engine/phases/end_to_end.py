"""The stage ``e2e_qp``: the scales of all blocks together; the integers stay as Block-AP left them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from torch import Tensor, nn

from engine import telemetry
from engine.checkpoints.snapshots import resumable
from engine.config.stages import STAGES
from engine.methods.network.e2e_qp import train_scales
from engine.methods.network.network import NetworkData
from engine.phases.job import Job, compute_dtype
from engine.phases.passage import forget_streams
from engine.phases.teacher import is_taught, teacher
from engine.quant.packed import PackedLinear
from engine.quant.slots import slots
from engine.run.facts import done_fact, stage_entry


def train_end_to_end(job: Job) -> None:
    """Train and commit the scales. What teaches is closed in the end: ``job.full``, where that is kept."""
    stage = STAGES["e2e_qp"]
    if job.is_done(stage):
        return
    config = msgspec.structs.replace(job.config.e2e_qp, micro_batch_size=job.micro_batch(stage))
    dtype = compute_dtype(config.compute_dtype, job.device)
    text = job.tokens.of(stage.name)
    taught = teacher(job, stage) if is_taught(job, stage) else None
    blocks = []
    for index in range(job.blocks):
        blocks.append(job.packed(index).install(job.lm.load_block(index, dtype=dtype)))
        job.report.leave_if_asked()
    telemetry.release_memory()
    try:
        with resumable(job.checkpoints, stage.name) as keeper:
            train_scales(
                job.lm,
                blocks,
                NetworkData(text.tokens_NT, text.train, taught),
                config,
                seed=job.network_seed(stage),
                dtype=dtype,
                progress=job.report,
                snapshot=keeper.snapshot,
                keeper=keeper,
                world=job.world,
                recompute=job.plan.recomputes,
                compiles=job.plan.compiles_e2e,
            )
    finally:
        if taught is not None:
            taught.close()
    forget_streams(job)
    job.store.remember(done_fact(stage), True)
    job.checkpoints.commit(
        stage.name,
        entries={
            stage_entry(stage, index): _trained(block, job.lm.linear_names(index))
            for index, block in enumerate(blocks)
        },
    )


def _trained(block: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The scales and zero points of a block's linears, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for slot in slots(block, names):
        linear = slot.get()
        assert isinstance(linear, PackedLinear), slot.name
        weight = linear.packed()
        tensors[f"{slot.name}.scale"], tensors[f"{slot.name}.zero_point"] = weight.scale, weight.zero_point
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
