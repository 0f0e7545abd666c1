"""An extension as somebody else would write one: a method that goes block by block, one that trains the whole
network, and an export format. Rows and sections only; what they do is in :mod:`toy_work`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from toy_format import ROW

from engine.config import checks
from engine.config.formats import FORMATS
from engine.config.run import RunConfig, register_section, unregister_section
from engine.config.stage_section import StageSection, check_sequences
from engine.config.stages import STAGES, Stage
from engine.plan.estimate import Workload
from engine.plan.network_training import NetworkTraining
from engine.plan.rates import Speed


class ToyBlockConfig(StageSection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A method that looks at each block alone."""

    enabled: bool = False
    """Scales are fitted to the weights, block by block."""
    steps: int = 6
    """A block is fitted for this many steps."""

    def check(self, name: str) -> None:
        checks.count(f"{name}.steps", self.steps)


class ToyNetworkConfig(StageSection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A method that trains all blocks together."""

    enabled: bool = False
    """Scales are trained on what the model predicts."""
    sequences: int = 4
    """The model is trained on this many sequences."""
    val_sequences: int = 0
    """The validation loss is measured on this many sequences."""
    sequence_length: int = 16
    """A sequence has this many tokens."""
    batch_size: int = 2
    """An optimizer step sees this many sequences."""
    micro_batch_size: int = 1
    """A pass takes this many sequences."""
    epochs: int = 3
    """The model is trained for this many passes over the training sequences."""
    lr_final_fraction: float = 0.0
    """The schedule ends at this fraction of the learning rate."""
    weight_decay: float = 0.0
    """The decay is this fraction of the learning rate."""
    grad_clip: float = 0.0
    """A gradient's norm is clipped to this."""
    patience: int = 0
    """Training stops after this many epochs without a better loss."""
    compute_dtype: str = "float32"
    """The forward pass computes in this type."""

    def check(self, name: str) -> None:
        check_sequences(name, self)


class ToyCosts(NetworkTraining):
    """What the plan has to know of the second method."""

    def trains(self, config: RunConfig) -> tuple[str, ...]:
        return ("scales",)

    def network_memory(self, work: Workload) -> dict[str, int]:
        return {"packed blocks": work.arch.blocks * work.arch.linear_params_per_block}

    def training_seconds(self, work: Workload, rates: Speed) -> float:
        return 7.0


BLOCK = Stage(
    name="toy_block",
    label="Toy blocks",
    scope="block",
    run="toy_work:make_blocks",
    about="Toy blocks fits the scales of each block.",
)
NETWORK = Stage(
    name="toy_network",
    label="Toy network",
    scope="network",
    run="toy_work:train_network_scales",
    costs="toys:ToyCosts",
    reads_text=True,
    about="Toy network trains all scales once more.",
)


def register() -> None:
    """Everything into the tables; what an extension does when it is imported."""
    register_section("toy_block", ToyBlockConfig)
    register_section("toy_network", ToyNetworkConfig)
    STAGES.register(BLOCK)
    STAGES.register(NETWORK)
    FORMATS.register(ROW)


@contextmanager
def registered() -> Iterator[None]:
    """In this process, for as long as the context lasts."""
    register()
    try:
        yield
    finally:
        for table, row in ((STAGES, BLOCK), (STAGES, NETWORK), (FORMATS, ROW)):
            table.unregister(row.name)
        unregister_section("toy_network")
        unregister_section("toy_block")
