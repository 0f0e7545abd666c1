"""LR-QAT: integers and scales of all blocks, by factors of low rank.

memory    frozen latents of all weights in 1 to 2 bytes each (fewer as integers); factors, scales and what
          else is trained, with gradients and AdamW's moments; one linear's weight while it is computed or
          differentiated; activations, logits and the teacher as in E2E-QP
time      as E2E-QP; every weight is computed in each forward and backward pass, its factors' product too
disk      integers, scales and zero points of every block, snapshots of what is trained, the teacher
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.latents import FIXED_BITS, downcast_bits
from engine.config.run import RunConfig
from engine.plan.costs import Steps
from engine.plan.estimate import Workload
from engine.plan.object_sizes import Factors, integers_bytes, snapshot_bytes, trained_parameters
from engine.plan.rates import Speed
from engine.plan.stages.e2e_qp import E2EQPCosts

PASSES = 3
"""Plain unpackings' worth of traffic that one float weight takes: decoded, added to, rounded, scaled."""
FORM, GRADIENT = 3.2, 6.0
"""The same by one kernel each, in unpackings by a kernel: 0.61 and 0.99 ms for a 7B layer on an H200, whose
bytes would allow 0.14 and 0.33, and 0.25 for the factors' gradients, too thin for a GPU's products."""


class LRQATCosts(E2EQPCosts):
    """Of ``lr_qat``."""

    def warnings(self, config: RunConfig) -> Iterator[str]:
        section = self.section(config)
        if section.start == "latents" and section.downcast == "fixed" and config.grid.bits == FIXED_BITS:
            yield (
                f"at {FIXED_BITS} bits lr_qat.downcast = fixed keeps no fraction of a weight, so it starts "
                "at integers, from which little moves: lr_qat.downcast = float16 keeps one"
            )

    def factors(self, work: Workload) -> Factors:
        """Those of each linear."""
        section = self.section(work.config)
        return Factors(section.rank, "F32" if section.factor_dtype == "float32" else "BF16")

    def trained_parameters(self, work: Workload) -> int:
        trained = self.trains(work.config)
        return work.arch.blocks * trained_parameters(work.arch, work.config.grid, trained, self.factors(work))

    def snapshot_bytes(self, work: Workload) -> int:
        section, blocks = self.section(work.config), work.arch.blocks
        best, factors = section.val_sequences > 0, self.factors(work)
        return snapshot_bytes(work, section.train, blocks=blocks, best=best, factors=factors)

    # Memory

    def blocks_and_optimizer(self, work: Workload) -> dict[str, int]:
        section, arch, grid = self.section(work.config), work.arch, work.config.grid
        weights = arch.blocks * arch.linear_params_per_block
        groups = arch.blocks * arch.groups_per_block(grid.group_size)
        norms = arch.blocks * (arch.norm_params_per_block + arch.bias_params_per_block) * work.model_bytes
        return {
            "frozen latents": weights * downcast_bits(section.downcast, grid.bits) // 8
            + groups * (1 + 3 * 4)  # what they are counted from; zero points, scales and their floors
            + norms,
            "factors": 4 * self.trained_parameters(work),
            "optimizer": (8 + 4) * self.trained_parameters(work),
        }

    def weight_bytes(self, work: Workload) -> int:
        compute = work.bytes_of(self.section(work.config).compute_dtype)
        # The weight, its gradient, and that of the latents; in torch's own operations latents, integers as
        # numbers, and which of them are inside.
        return 3 * compute + (0 if work.cuda and self._by_kernel(work) else 4 + 4 + 1)

    # Time

    def steps(self, work: Workload, rates: Speed) -> Steps:
        """As E2E-QP's where a kernel makes the weights, else never compiled."""
        steps = super().steps(work, rates)
        return steps if self._by_kernel(work) else Steps(recorded=steps.recorded)

    def _by_kernel(self, work: Workload) -> bool:
        return self.section(work.config).downcast != "integer"

    def unpacked_seconds(self, work: Workload, rates: Speed, micro_steps: int) -> float:
        """Every weight once in each pass; the factors' products, and those of their gradients."""
        arch, rank = work.arch, self.section(work.config).rank
        passes, weights = 3 if self.recomputes(work) else 2, arch.linear_params_per_block
        if self.steps(work, rates).recorded and self._by_kernel(work):
            traffic = (FORM * passes + GRADIENT) * weights * rates.kernel_unpack_per_weight
        else:
            traffic = PASSES * passes * weights * rates.unpack_per_weight
        products = 2 * rank * weights * (passes + 2) / rates.flops
        return micro_steps * arch.blocks * (traffic + products)

    def result_bytes(self, work: Workload) -> int:
        norms = "norms" in self.trains(work.config)
        return work.arch.blocks * integers_bytes(work.arch, work.config.grid, norms=norms)
