"""Block-AP: of one block, all weights and the grid they are rounded to.

memory    float32 weights, AdamW moments, on the CPU the copies of the start and of the best state (a GPU
          keeps them on the host); plus the larger of (activations of a batch + fake-quantized weights) at
          the top of the backward pass and (float32 gradients) at its bottom; beside it two streams of
          sequences x length x hidden. A search for where grids start comes before all of that
a step    3 forward passes of its batch, and fake quantization and AdamW of every weight; where the largest
          errors are left out, finding them
a start   by a search: a forward pass of some sequences, and every weight with every candidate; by GPTQ:
          what that takes of a block (:mod:`engine.plan.stages.gptq`)
disk      every finished block once, with the latents of its weights where a stage behind it starts from them,
          snapshots, stored streams
"""

from __future__ import annotations

import math

from engine.config.joint_search import GPU_VALUES, SEQUENCES, VALUES, candidates
from engine.config.kept_latents import kept_latents
from engine.config.latents import Downcast
from engine.config.run import RunConfig
from engine.plan.block_training import BlockTraining
from engine.plan.costs import Steps
from engine.plan.estimate import CONSTANTS, Workload
from engine.plan.memory_terms import activation_bytes, largest_linear, passing_bytes
from engine.plan.passages import passing
from engine.plan.portions import passed_together
from engine.plan.ranks import shared_saves
from engine.plan.rates import COMPILING_PAYS, Speed, forward_flops
from engine.plan.stages.gptq import gptq_parts, gptq_seconds


class BlockAPCosts(BlockTraining):
    """Of ``block_ap``."""

    def latents(self, config: RunConfig) -> Downcast | None:
        return kept_latents(config)

    def block_memory(self, work: Workload) -> dict[str, int]:
        section, arch = self.section(work.config), work.arch
        compute = work.bytes_of(section.compute_dtype)
        batch, length = section.batch_size, section.sequence_length
        tokens = batch * length
        trained = self.trained_parameters(work)
        top_of_backward = (
            activation_bytes(work, batch, length, compute, "master")
            + compute * tokens * (3 * arch.hidden + 3 * arch.intermediate)  # batch, target, output; gradients
            + 4 * tokens * arch.hidden * self._loss_tensors(work)
            + compute * arch.linear_params_per_block
        )
        at_a_time = min(passed_together(work, batch, length), section.sequences + section.val_sequences)
        advancing = passing_bytes(arch, compute, at_a_time, length)
        weights = arch.params_per_block + 3 * arch.groups_per_block(work.config.grid.group_size)
        return {
            "weights of a block": 4 * weights,
            "optimizer": 8 * self.stepped_weights(work),
            "activations and gradients": max(
                top_of_backward, 4 * trained, advancing, self._search_bytes(work)
            ),
            "fake quantization": 4 * largest_linear(arch) * CONSTANTS.fake_quant_tensors,
        }

    def _loss_tensors(self, work: Workload) -> int:
        """float32 hidden states around the loss."""
        dropping = CONSTANTS.gpu_dropping_tensors if work.cuda else CONSTANTS.cpu_dropping_tensors
        return CONSTANTS.loss_tensors + (dropping if self.section(work.config).drop_largest else 0)

    def _search_bytes(self, work: Workload) -> int:
        """What a search for the start holds, before there are moments and activations."""
        section = self.section(work.config)
        if section.start == "gptq":
            compute = work.bytes_of(section.compute_dtype)
            parts = gptq_parts(work, section.batch_size, section.sequence_length, compute)
            # Beside the latents; and what the optimizer will have is not there yet.
            beside = 4 * work.arch.linear_params_per_block + sum(parts.values())
            return max(0, beside - 8 * self.trained_parameters(work))
        if section.start != "search" or self._searches_by_kernel(work):
            return 0
        return 4 * (GPU_VALUES if work.cuda else VALUES) * CONSTANTS.search_tensors

    def _searches_by_kernel(self, work: Workload) -> bool:
        """Groups that are too large for it (whole rows) take torch's form."""
        runtime = work.config.runtime
        kernels = work.cuda and runtime.compile != "off" and not runtime.deterministic
        return kernels and work.config.grid.group_size > 0

    def start_seconds(self, work: Workload, rates: Speed) -> float:
        section = self.section(work.config)
        if section.start == "gptq":
            sequences = min(work.config.gptq.sequences, section.sequences)
            return gptq_seconds(work, rates, sequences, section.sequence_length, section.batch_size)
        if section.start != "search":
            return super().start_seconds(work, rates)
        error = rates.kernel_search_error if self._searches_by_kernel(work) else rates.search_error
        errors = candidates(work.config.grid.shared) * work.arch.linear_params_per_block
        sequences = min(SEQUENCES, section.sequences)
        statistics = passing(work, rates, sequences, section.sequence_length, section.batch_size)
        return statistics + errors * error

    def steps(self, work: Workload, rates: Speed) -> Steps:
        return Steps(recorded=self._recorded(work), compiled=self._compiled(work, rates))

    def _recorded(self, work: Workload) -> bool:
        """On every GPU, where it can: clipping needs the gradients' norm before the step."""
        allowed = self.may_compile(work) and work.config.runtime.compile != "off"
        return allowed and not self.section(work.config).grad_clip

    def shares_out(self, work: Workload) -> bool:
        return self._recorded(work)

    def _compiled(self, work: Workload, rates: Speed) -> bool:
        """On a GPU, where all steps together take long enough."""
        if not self.may_compile(work):
            return False
        if work.config.runtime.compile != "auto":
            return work.config.runtime.compile == "on"
        section = self.section(work.config)
        steps = section.epochs * math.ceil(section.sequences / section.batch_size) * work.arch.blocks
        saved = self._step(work, rates, compiled=False) - self._step(work, rates, compiled=True)
        return steps * saved >= COMPILING_PAYS

    def step_seconds(self, work: Workload, rates: Speed) -> float:
        return self._step(work, rates, compiled=self._compiled(work, rates))

    def _step(self, work: Workload, rates: Speed, *, compiled: bool) -> float:
        section, arch = self.section(work.config), work.arch
        tokens = section.batch_size * section.sequence_length
        compute = 3 * tokens * forward_flops(arch, section.sequence_length) / rates.flops
        if section.drop_largest:
            compute += tokens * arch.hidden * rates.drop_per_number
        recorded = self._recorded(work)
        if not compiled and not recorded:
            return compute + arch.linear_params_per_block * rates.plain.per_weight + rates.plain.launch
        cost = (rates.fast if compiled else rates.recorded) if recorded else rates.compiled
        weight = cost.per_weight - (shared_saves(work, rates) if recorded else 0.0)
        compute += tokens * arch.hidden * cost.per_number
        return max(compute + arch.linear_params_per_block * weight, cost.launch)
