"""Room for a whole model, in the phases that have all of its blocks in memory for once."""

from __future__ import annotations

import msgspec
import torch

from engine.config.run import RunConfig
from engine.plan.fit import whole_model_budget
from engine.plan.machine import Machine
from engine.system.allowance import memory_available


def free_for_blocks(config: RunConfig, device: torch.device, machine: Machine) -> tuple[int, str]:
    """Bytes that blocks may take, less a reserve for the cache of keys and values, and of what."""
    cuda = device.type == "cuda"
    if cuda:
        # What torch keeps for its next tensor is not free to others, but it is to us.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        now = msgspec.structs.replace(machine, gpu_free=torch.cuda.mem_get_info(device)[0] + kept)
    else:
        now = msgspec.structs.replace(machine, host_free=memory_available())
    return whole_model_budget(config, now, cuda=cuda), "the GPU" if cuda else "this machine"
