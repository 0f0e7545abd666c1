"""The phase ``e2e_qp``: the scales of all blocks together; the integers stay as Block-AP left them."""

from __future__ import annotations

from torch import Tensor, nn

from engine import telemetry
from engine.checkpoints.commits import TrainingCheckpoints, forget_snapshot, restore_random_state, snapshot_of
from engine.config.stages import STAGES
from engine.methods.network.e2e_qp import E2EData, train_scales
from engine.phases.job import Job, compute_dtype
from engine.phases.passage import forget_streams
from engine.phases.teacher import is_taught, teacher
from engine.quant.packed import PackedLinear
from engine.run.facts import done_fact, stage_entry


def train_end_to_end(job: Job) -> None:
    """Train and commit the scales; closes Block-AP's full-precision stream where that teaches."""
    stage = STAGES["e2e_qp"]
    if job.is_done(stage):
        return
    config = job.config.e2e_qp
    dtype = compute_dtype(config.compute_dtype, job.device)
    taught = teacher(job, job.full) if is_taught(job) else None
    blocks = []
    for index in range(job.blocks):
        blocks.append(job.packed(index).install(job.lm.load_block(index, dtype=dtype)))
        job.report.leave_if_asked()
    telemetry.release_memory()
    snapshot = snapshot_of(job.store, "e2e_qp")
    if snapshot is not None:
        restore_random_state(snapshot.tensors, job.device)
    try:
        with TrainingCheckpoints(job.checkpoints, "e2e_qp") as progress:
            train_scales(
                job.lm,
                blocks,
                E2EData(job.tokens.e2e_qp, job.tokens.e2e_qp_train, taught),
                config,
                seed=job.network_seed(stage),
                dtype=dtype,
                progress=progress,
                snapshot=snapshot,
                world=job.world,
                recompute=job.plan.recomputes,
                compiles=job.plan.compiles_e2e,
            )
    finally:
        if taught is not None:
            taught.close()
    forget_snapshot(job.store)
    forget_streams(job)
    job.store.remember(done_fact(stage), True)
    job.checkpoints.commit(
        "e2e_qp", entries={stage_entry(stage, index): _trained(block) for index, block in enumerate(blocks)}
    )


def _trained(block: nn.Module) -> dict[str, Tensor]:
    """The scales and zero points of a block's linears, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, module in block.named_modules():
        if isinstance(module, PackedLinear):
            weight = module.packed()
            tensors[f"{name}.scale"], tensors[f"{name}.zero_point"] = weight.scale, weight.zero_point
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
