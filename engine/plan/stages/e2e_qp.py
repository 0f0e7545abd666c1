"""E2E-QP: the scales of all blocks, and norms, on packed integers that stay as they are.

memory    packed integers of all blocks; scales with gradient, moments and copies; the input of every block
          (or all activations), one block's activations, logits of a chunk of tokens; beside it the
          teacher's last hidden states
time      3 forward passes a token (4 with recomputation), the head forward and backward; the teacher's
          blocks, unless Block-AP's full-precision stream ended as just that
disk      scales and zero points of every block, and norms that it trains; snapshots; the teacher where
          streams are stored
"""

from __future__ import annotations

import math

from engine.config.run import RunConfig
from engine.config.stages import learns_answers
from engine.plan.answers import mask_memory
from engine.plan.costs import Steps, Text
from engine.plan.estimate import CONSTANTS, Workload
from engine.plan.memory_terms import Form, activation_bytes, largest_linear, logits
from engine.plan.network_training import NetworkTraining
from engine.plan.object_sizes import scales_bytes
from engine.plan.rates import COMPILING_NETWORK_PAYS, PassageCost, Speed, forward_flops, unpacking


class E2EQPCosts(NetworkTraining):
    """Of ``e2e_qp``."""

    def result_bytes(self, work: Workload) -> int:
        norms = "norms" in self.trains(work.config)
        return work.arch.blocks * scales_bytes(work.arch, work.config.grid, norms=norms)

    def teacher_text(self, config: RunConfig) -> Text | None:
        return self.text(config) if self.section(config).loss == "kl" else None

    # Memory

    def network_memory(self, work: Workload) -> dict[str, int]:
        section = self.section(work.config)
        return {
            **self.blocks_and_optimizer(work),
            **mask_memory(work, self.stage, section.micro_batch_size, section.sequence_length),
            "activations": self._activations(work),
            **self._head_and_backward(work),
        }

    def blocks_and_optimizer(self, work: Workload) -> dict[str, int]:
        """All blocks, and what training them keeps beside activations."""
        arch, grid = work.arch, work.config.grid
        scales = arch.blocks * arch.groups_per_block(grid.group_size)
        return {
            "packed blocks": arch.blocks * (arch.linear_params_per_block * grid.bits // 8)
            + scales
            + arch.blocks * (arch.norm_params_per_block + arch.bias_params_per_block) * work.model_bytes,
            "scales and optimizer": 4 * scales + (4 + 8) * self.trained_parameters(work),
        }

    def _block(self, work: Workload) -> int:
        """What one block keeps for its backward pass."""
        section = self.section(work.config)
        form: Form = "compiled" if self.stage.name in work.compiled else "plain"
        compute = work.bytes_of(section.compute_dtype)
        return activation_bytes(work, section.micro_batch_size, section.sequence_length, compute, form)

    def _activations(self, work: Workload) -> int:
        section, arch = self.section(work.config), work.arch
        compute = work.bytes_of(section.compute_dtype)
        tokens = section.micro_batch_size * section.sequence_length
        inputs = arch.blocks * tokens * arch.hidden * compute
        kept = inputs if self.recomputes(work) else arch.blocks * self._block(work)
        # A batch of the teacher's hidden states, and the next one on its way.
        teacher = 2 * tokens * arch.hidden * compute if section.loss == "kl" and work.cuda else 0
        return kept + 3 * tokens * arch.hidden * compute + teacher

    def _head_and_backward(self, work: Workload) -> dict[str, int]:
        """The head's and the blocks' backward passes take turns: a GPU's allocator reuses the memory, the
        CPU's heap keeps what blocks used while the logits, too large for it, are mapped beside it."""
        section, arch = self.section(work.config), work.arch
        compute = work.bytes_of(section.compute_dtype)
        tokens = section.micro_batch_size * section.sequence_length
        kl = section.loss == "kl"
        if self.stage.name in work.compiled:
            head = logits(work, tokens) * compute
            head *= CONSTANTS.logits_fused_kl if kl else CONSTANTS.logits_fused
        else:
            tensors = CONSTANTS.logits_kl if kl else CONSTANTS.logits_cross_entropy
            head = logits(work, tokens) * (4 * tensors + (compute if compute < 4 else 0))
        # On a GPU, what is kept of a block is there once; the CPU's heap keeps the room beside it.
        again = self._block(work) if self.recomputes(work) or not work.cuda else 0
        backward = again + compute * tokens * 3 * arch.intermediate
        backward += largest_linear(arch) * self.weight_bytes(work)
        if work.cuda:
            return {"logits or one block's backward": max(head, backward)}
        widest = 4 * tokens * arch.intermediate
        holes = 0
        if self.recomputes(work) and widest < CONSTANTS.mmap_threshold:
            per_block = widest + 2 * 4 * tokens * arch.hidden
            holes = int(CONSTANTS.checkpoint_holes * arch.blocks * per_block)
        return {"logits": head, "one block's backward": backward, "holes in the heap": holes}

    def weight_bytes(self, work: Workload) -> int:
        """Bytes of a linear's weight and its gradient, and of what is made on the way, for each weight."""
        if self.stage.name in work.compiled:  # by kernels
            return 3 * work.bytes_of(self.section(work.config).compute_dtype)
        return CONSTANTS.unpack_bytes

    # Time

    def steps(self, work: Workload, rates: Speed) -> Steps:
        """Recorded on every GPU. Compiled where that pays: it saves most of the traffic between products."""
        if not self.may_compile(work) or work.config.runtime.compile == "off":
            return Steps()
        if work.config.runtime.compile == "on":
            return Steps(recorded=True, compiled=True)
        saved = self._traffic(work, rates.passage) - self._traffic(work, rates.compiled_passage)
        return Steps(recorded=True, compiled=saved >= COMPILING_NETWORK_PAYS)

    def _traffic(self, work: Workload, cost: PassageCost) -> float:
        """Seconds of all that lies between the products of blocks."""
        section, arch = self.section(work.config), work.arch
        factor = 4 if self.recomputes(work) else 3
        tokens = section.epochs * section.sequences * section.sequence_length
        # A backward pass moves one and a half times what a forward pass does.
        return (factor - 0.5) * tokens * arch.blocks * arch.hidden * cost.per_number

    def _head_traffic(self, work: Workload, rates: Speed, steps: Steps) -> float:
        """Seconds of all that a GPU does with logits beside their products."""
        section = self.section(work.config)
        of_logit = CONSTANTS.gpu_logit_bytes
        if steps.compiled:
            of_logit = CONSTANTS.gpu_fused_logit_bytes
        elif steps.recorded and not learns_answers(work.config, self.stage):  # which differ in number
            of_logit = CONSTANTS.gpu_kernel_logit_bytes
        logits = section.epochs * section.sequences * section.sequence_length * work.arch.vocab
        return logits * of_logit[section.loss == "kl"] * rates.per_byte

    def compiling_seconds(self, work: Workload, rates: Speed) -> float:
        return CONSTANTS.gpu_compile_network if self.steps(work, rates).compiled else 0.0

    def training_seconds(self, work: Workload, rates: Speed) -> float:
        section, arch = self.section(work.config), work.arch
        length = section.sequence_length
        training = section.epochs * section.sequences
        validation = (section.epochs + 1) * section.val_sequences
        factor = 4 if self.recomputes(work) else 3
        forward = arch.blocks * forward_flops(arch, length)
        head = 2 * arch.vocab * arch.hidden
        teacher = head if section.loss == "kl" else 0
        flops = training * length * (factor * forward + 2 * head + teacher)
        flops += validation * length * (forward + head + teacher)
        micro_steps = math.ceil(training / section.micro_batch_size)
        steps = self.steps(work, rates)
        cost = rates.compiled_passage if steps.compiled else rates.passage
        traffic = self._traffic(work, cost) + self._head_traffic(work, rates, steps)
        unpacked = self.unpacked_seconds(work, rates, micro_steps)
        working, passed = flops / rates.flops + traffic + unpacked, micro_steps * arch.blocks
        if steps.recorded:  # one launch, whose kernels still follow each other
            gap = CONSTANTS.gpu_fast_gap if steps.compiled else CONSTANTS.gpu_recorded_gap
            return working + self.between_kernels(work, passed, gap)
        return max(working, passed * cost.launch * factor)

    def between_kernels(self, work: Workload, passed: int, gap: float) -> float:
        """Seconds in which a GPU waits for the next kernel of so many blocks' passes."""
        return passed * gap

    def unpacked_seconds(self, work: Workload, rates: Speed, micro_steps: int) -> float:
        """What goes over the weights beside their products."""
        factor = 4 if self.recomputes(work) else 3
        return micro_steps * work.arch.blocks * factor * unpacking(work, rates)
