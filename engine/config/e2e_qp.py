"""E2E-QP: end-to-end training of quantization parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import msgspec

from engine.config.base import ComputeDtype, LearningRateScaling
from engine.config.grid import GridConfig
from engine.config.stage_section import (
    NO_ZERO_POINTS,
    NetworkSection,
    check_network,
    check_trained,
)
from engine.errors import UsageError


class E2EQPConfig(NetworkSection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """End-to-end training of quantization parameters (EfficientQAT, section 3.3)."""

    enabled: bool = True
    """E2E-QP trains the scales of the whole model after its blocks."""
    train: tuple[Literal["scales", "zero_points", "norms"], ...] = ("scales",)
    """E2E-QP trains these; the integers are fixed."""
    sequences: int = 512
    """The model is trained on this many sequences."""
    val_sequences: int = 16
    """The validation loss is measured on this many sequences; 0 turns validation off and keeps the last
    state."""
    sequence_length: int = 2048
    """A sequence has this many tokens."""
    batch_size: int = 8
    """An optimizer step sees this many sequences, over all ranks and micro-batches."""
    micro_batch_size: int = 0
    """A forward and backward pass takes this many sequences; 0 leaves it to the plan, which takes as many as
    make the training faster and fit into memory."""
    epochs: int = 1
    """The model is trained for this many passes over the training sequences."""
    loss: Literal["cross_entropy", "kl"] = "kl"
    """The loss is next-token cross-entropy, or KL divergence to the full-precision model's prediction."""
    text_weight: float = 0.0
    """Beside the KL divergence, next-token cross-entropy counts this much: what the text says, not only what
    the model made of it."""
    lr_scaling: LearningRateScaling = "relative"
    """``relative`` multiplies a learning rate by each linear's mean initial scale; ``absolute`` does not."""
    lr: float | None = None
    """What is trained (norms, when relative times their mean) learns at this rate; none takes 2e-5 (2 bits)
    or 1e-5 when absolute, 0.005 when relative."""
    lr_final_fraction: float = 0.0
    """The cosine schedule ends at this fraction of the initial learning rate."""
    warmup_fraction: float = 0.03
    """The learning rate rises from 0 over this fraction of the steps."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay is this fraction of the learning rate; 0 turns it off."""
    grad_clip: float = 0.3
    """A gradient's norm is clipped to this; 0 turns clipping off."""
    patience: int = 0
    """Training stops after this many epochs without a better validation loss; 0 trains all epochs."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Each block is recomputed in the backward pass instead of keeping its activations, which takes a third
    more time; auto does it where memory asks for it."""
    compute_dtype: ComputeDtype = "auto"
    """The forward pass computes in this type; auto takes bfloat16 on a GPU and float32 on the CPU."""

    def check_on(self, grid: GridConfig, name: str) -> None:
        if grid.fixes_zero_points and "zero_points" in self.train and self.enabled:
            raise UsageError(
                NO_ZERO_POINTS,
                where=f"{name}.train",
                hint='["scales"], or grid.symmetric = false and grid.zero_point = learned',
            )
        self.check(name)

    def check(self, name: str) -> None:
        check_trained(f"{name}.train", self.train, self.train, enabled=self.enabled)
        check_network(name, self, "lr")

    def resolved(self, grid: GridConfig) -> Self:
        """A learning rate that was left out follows bits and scaling."""
        lr = (2e-5 if grid.bits == 2 else 1e-5) if self.lr_scaling == "absolute" else 0.005
        return msgspec.structs.replace(self, lr=lr if self.lr is None else self.lr)

    @classmethod
    def silent(cls) -> tuple[str, ...]:
        return ("text_weight",)

    @classmethod
    def younger(cls) -> tuple[str, ...]:
        return ("text_weight",)

    @classmethod
    def as_written_now(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Whether activations are recomputed was true or false before it could be ``auto``."""
        word = tree.get("activation_checkpointing")
        if not isinstance(word, bool):
            return tree
        return {**tree, "activation_checkpointing": "on" if word else "off"}
