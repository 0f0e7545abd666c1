"""Stages and a format that only the tests of the plan know, as somebody else's package would add them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.config.run import RunConfig
from engine.config.stages import STAGES, Stage
from engine.plan.block_training import BlockTraining
from engine.plan.estimate import Workload
from engine.plan.memory_terms import activation_bytes
from engine.plan.network_training import NetworkTraining
from engine.plan.rates import Speed


class ToyStage(Stage, frozen=True):
    """Made in every run."""

    def wanted(self, config: RunConfig) -> bool:
        return True


@contextmanager
def registered(**fields: str) -> Iterator[ToyStage]:
    """A toy stage in the table."""
    stage = ToyStage(label="toy", **fields)
    STAGES.register(stage)
    try:
        yield stage
    finally:
        STAGES.unregister(stage.name)


class BlockToyCosts(BlockTraining):
    """A training of blocks, set like Block-AP, whose step takes a second."""

    section_name = "block_ap"

    def block_memory(self, work: Workload) -> dict[str, int]:
        section = self.section(work.config)
        kept = activation_bytes(work, section.batch_size, section.sequence_length, 4, "master")
        return {"weights and moments": 12 * self.trained_parameters(work), "activations": kept}

    def step_seconds(self, work: Workload, rates: Speed) -> float:
        return 1.0


class NetworkToyCosts(NetworkTraining):
    """A training of the whole network, set like E2E-QP, that takes an hour."""

    section_name = "e2e_qp"

    def network_memory(self, work: Workload) -> dict[str, int]:
        return {"everything": 3 << 30}

    def training_seconds(self, work: Workload, rates: Speed) -> float:
        return 3600.0


def toy_bytes(out_features: int, in_features: int, bits: int, group_size: int) -> int:
    """Of a linear in a format that stores a byte a weight."""
    return out_features * in_features
