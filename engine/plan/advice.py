"""What a plan says of a recipe that serves the model better than the one that was asked for."""

from __future__ import annotations

import msgspec

from engine.config.stages import STAGES
from engine.plan.costs import costs_of
from engine.plan.estimate import Workload
from engine.plan.fit import fits_device

MOST_BITS = 3
"""Up to these, moving integers was measured to be worth its memory, on two models (benchmarks/README.md,
"Three seeds of two models")."""
MOST_WEIGHTS = 2_000_000_000
"""Of models like those that were measured; what larger ones gain is not known."""


def better_recipe(work: Workload, gpu_free: int) -> str:
    """In words, that integers could be trained end to end as well as scales; empty where they are, where the
    GPU has no room for that, or where a published recipe is followed."""
    config = work.config
    scales_alone = config.e2e_qp.enabled and not config.e2e_qat.enabled and not config.lr_qat.enabled
    ours = config.block_ap.enabled and config.e2e_qp.lr_scaling == "relative"
    measured = config.grid.bits <= MOST_BITS and work.arch.params <= MOST_WEIGHTS
    if not (work.cuda and scales_alone and ours and measured):
        return ""
    other = msgspec.structs.replace(
        config,
        e2e_qp=msgspec.structs.replace(config.e2e_qp, enabled=False),
        e2e_qat=msgspec.structs.replace(config.e2e_qat, enabled=True),
    )
    costs = costs_of(STAGES["e2e_qat"])
    moved = costs.with_micro_batch(msgspec.structs.replace(work, config=other), 1)
    if not fits_device(moved, gpu_free):
        return ""
    return (
        "this GPU has room to train integers as well as scales, which is more accurate: the preset small "
        "does, or e2e_qat.enabled=true with e2e_qp.enabled=false"
    )
