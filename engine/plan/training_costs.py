"""What the training of a stage costs whatever is trained, as far as its section of the configuration says.

The section has the fields ``sequences``, ``val_sequences``, ``sequence_length``, ``batch_size``, ``epochs``
and ``compute_dtype``, meaning what they mean for Block-AP and E2E-QP, and ``train``, unless
:meth:`TrainingCosts.trains` says it otherwise.
"""

from __future__ import annotations

from typing import Any

from engine.config.run import RunConfig
from engine.plan.costs import StageCosts, Text
from engine.plan.estimate import Workload
from engine.plan.object_sizes import snapshot_bytes, trained_parameters
from engine.plan.ranks import MESSAGE_SECONDS, shared_seconds
from engine.plan.rates import Speed


class TrainingCosts(StageCosts):
    """Of a stage that trains."""

    @property
    def section_name(self) -> str:
        """The section of the configuration that it is set by."""
        return self.stage.name

    def section(self, config: RunConfig) -> Any:
        """That section."""
        return getattr(config, self.section_name)

    def trains(self, config: RunConfig) -> tuple[str, ...]:
        """What is trained of a block: ``weights``, ``norms``, ``scales``, ``zero_points``."""
        trained: tuple[str, ...] = self.section(config).train
        return trained

    def trained_blocks(self, work: Workload) -> int:
        """How many blocks are trained together."""
        return 1 if self.stage.scope == "block" else work.arch.blocks

    def trained_parameters(self, work: Workload) -> int:
        """Parameters that are trained together."""
        of_block = trained_parameters(work.arch, work.config.grid, self.trains(work.config))
        return self.trained_blocks(work) * of_block

    def adding_seconds(self, work: Workload, rates: Speed) -> float:
        """Of a step of several GPUs: adding up their gradients, which are float32 like what is trained, once
        for all micro-batches. Where weights are shared out that is as much in two halves."""
        if not work.adding:
            return 0.0
        if not self.shares_out(work):
            return 2 * MESSAGE_SECONDS + work.adding * 4 * self.trained_parameters(work)
        arch, blocks = work.arch, self.trained_blocks(work)
        weights = blocks * arch.linear_params_per_block
        groups = blocks * arch.groups_per_block(work.config.grid.group_size)
        number = work.bytes_of(self.section(work.config).compute_dtype)
        return shared_seconds(work, rates, weights, groups, number)

    def shares_out(self, work: Workload) -> bool:
        """Whether each of several GPUs takes the step of a part of the weights, by kernels of ours."""
        return False

    def stepped_weights(self, work: Workload) -> int:
        """Trained parameters whose optimizer's state a GPU holds: of weights its share."""
        trained = self.trained_parameters(work)
        if not work.adding or "weights" not in self.trains(work.config):
            return trained
        weights = self.trained_blocks(work) * work.arch.linear_params_per_block
        return trained - weights + -(-weights // work.config.runtime.gpus)

    def copies_bytes(self, work: Workload) -> int:
        """The state at the start, and with validation the best one, as float32."""
        return 4 * self.trained_parameters(work) * (2 if self.section(work.config).val_sequences else 1)

    def text(self, config: RunConfig) -> Text | None:
        section = self.section(config)
        return Text(
            section=self.section_name,
            sequences=section.sequences,
            val_sequences=section.val_sequences,
            sequence_length=section.sequence_length,
            compute_dtype=section.compute_dtype,
        )

    def snapshot_bytes(self, work: Workload) -> int:
        best = self.section(work.config).val_sequences > 0
        return snapshot_bytes(work, self.trains(work.config), blocks=self.trained_blocks(work), best=best)

    def may_compile(self, work: Workload) -> bool:
        """Whether there are steps that could be compiled: on a GPU; deterministic kernels are the plain
        ones."""
        return work.cuda and bool(self.trains(work.config)) and not work.config.runtime.deterministic
