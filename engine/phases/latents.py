"""Latents of blocks between two stages: Block-AP and GPTQ keep their own beside the integers, and a stage of
the whole network asks for those that the blocks were rounded from.

They lie in the block's own entry of the checkpoint, so that a block and its latents are damaged, shared and
trained again together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.config.stages import stages_of
from engine.phases.job import Job
from engine.quant.downcast import upcast
from engine.quant.fake_linear import steps_of
from engine.quant.packed import PackedBlock
from engine.quant.slots import slots
from engine.run.facts import block_entry

PREFIX = "latent."
"""Begins the names of latents among the tensors of a block."""


def named_latents(latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Latents by linear, as tensors of their block's entry."""
    return {PREFIX + name: latent for name, latent in latents.items()}


def latents(job: Job, index: int) -> dict[str, Tensor] | None:
    """Float32 latents of block ``index`` by linear, on the device; none where its integers are all that is
    known of it."""
    tensors = job.store.get(block_entry(index))
    packed = PackedBlock.from_tensors(tensors, job.config.grid.shared)
    if stages_of(job.config)[0].baseline:  # only rounded, from what can be read again
        block = job.lm.load_block(index, dtype=torch.float32)
        return {
            slot.name: steps_of(slot.linear().weight.detach(), packed.linears[slot.name].scale.to(job.device))
            for slot in slots(block, packed.linears)
        }
    if not any(name.startswith(PREFIX) for name in tensors):
        return None
    return {
        name: upcast(tensors[PREFIX + name], weight.zero_point, weight.grid).to(job.device)
        for name, weight in packed.linears.items()
    }
