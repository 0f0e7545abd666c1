"""E2E-QAT: integers and scales of all blocks.

memory    float32 latents of all weights, their gradients and AdamW's moments; on a GPU the quantized weights,
          with gradients in the arithmetic's type; the rest as in E2E-QP
time      as E2E-QP; AdamW and the quantizer go over every weight once a step
disk      integers, scales and zero points of every block, snapshots (16 bytes a weight), the teacher
"""

from __future__ import annotations

import math

from engine.plan.estimate import CONSTANTS, Workload
from engine.plan.object_sizes import integers_bytes
from engine.plan.ranks import shared_saves
from engine.plan.rates import Speed
from engine.plan.stages.e2e_qp import E2EQPCosts


class E2EQATCosts(E2EQPCosts):
    """Of ``e2e_qat``."""

    def blocks_and_optimizer(self, work: Workload) -> dict[str, int]:
        arch = work.arch
        weights = arch.blocks * arch.linear_params_per_block
        groups = arch.blocks * arch.groups_per_block(work.config.grid.group_size)
        norms = arch.blocks * (arch.norm_params_per_block + arch.bias_params_per_block) * work.model_bytes
        compute = work.bytes_of(self.section(work.config).compute_dtype)
        # A GPU keeps the quantized weights and their gradients; the CPU makes them for each forward pass, and
        # keeps the gradients of the latents.
        copies = 2 * compute if work.cuda else 2 * 4
        return {
            "latents and grid": 4 * (weights + 3 * groups) + norms,
            "optimizer": 8 * self.stepped_weights(work),
            "quantized weights and gradients": copies * weights,
        }

    def between_kernels(self, work: Workload, passed: int, gap: float) -> float:
        return passed * (gap - CONSTANTS.gpu_packed_gap)

    def _steps(self, work: Workload) -> int:
        section = self.section(work.config)
        return section.epochs * math.ceil(section.sequences / section.batch_size)

    def unpacked_seconds(self, work: Workload, rates: Speed, micro_steps: int) -> float:
        """AdamW and the quantizer, once a step."""
        steps, arch = self._steps(work), work.arch
        weight = rates.fast.per_weight if work.cuda else rates.plain.per_weight
        if self.shares_out(work):
            weight -= shared_saves(work, rates)
        return steps * arch.blocks * arch.linear_params_per_block * weight

    def shares_out(self, work: Workload) -> bool:
        return work.cuda

    def result_bytes(self, work: Workload) -> int:
        norms = "norms" in self.trains(work.config)
        return work.arch.blocks * integers_bytes(work.arch, work.config.grid, norms=norms)
