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

    def adding_seconds(self, work: Workload) -> float:
        """Of a step of several GPUs: adding up their gradients."""
        number = work.bytes_of(self.section(work.config).compute_dtype)
        return work.adding * number * self.trained_parameters(work) if work.adding else 0.0

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
