"""E2E-QAT: end-to-end training of the weights behind the integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import msgspec

from engine.config.base import ComputeDtype, LearningRateScaling
from engine.config.grid import GridConfig
from engine.config.latents import Start
from engine.config.stage_section import (
    NetworkSection,
    check_network,
    check_trained,
    trainable,
)

Trained = Literal["weights", "scales", "zero_points", "norms"]


class E2EQATConfig(NetworkSection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """End-to-end training of weights and grid."""

    enabled: bool = False
    """E2E-QAT trains the weights of the whole model, so that integers may change; it takes 16 bytes a
    weight."""
    train: tuple[Trained, ...] = ("weights", "scales")
    """E2E-QAT trains these, but for zero points where the grid fixes them."""
    start: Start = "integers"
    """Weights start at their ``integers``, or at the ``latents`` that were rounded to them: those of
    Block-AP or GPTQ, without them the original weights."""
    sequences: int = 1024
    """The model is trained on this many sequences."""
    val_sequences: int = 16
    """The validation loss is measured on this many sequences; 0 turns validation off and keeps the last
    state."""
    sequence_length: int = 1024
    """A sequence has this many tokens."""
    batch_size: int = 8
    """An optimizer step sees this many sequences, over all ranks and micro-batches."""
    micro_batch_size: int = 0
    """A forward and backward pass takes this many sequences; 0 leaves it to the plan, which takes as many as
    make the training faster and fit into memory."""
    epochs: int = 4
    """The model is trained for this many passes over the training sequences."""
    loss: Literal["cross_entropy", "kl"] = "kl"
    """The loss is next-token cross-entropy, or KL divergence to the full-precision model's prediction."""
    text_weight: float = 0.1
    """Beside the KL divergence, next-token cross-entropy counts this much: what the text says, not only what
    the model made of it."""
    lr_scaling: LearningRateScaling = "relative"
    """``relative`` multiplies a learning rate by each linear's mean initial scale; ``absolute`` does not."""
    lr_weight: float | None = None
    """Weights, which are counted in grid steps, learn at this rate; none takes 2e-5 when absolute, 0.01 when
    relative."""
    lr_quant: float | None = None
    """Scales and zero points (and norms, when relative times their mean) learn at this rate; none takes 2e-5
    when absolute, 0.005 when relative."""
    lr_final_fraction: float = 0.0
    """The cosine schedule ends at this fraction of the initial learning rate."""
    warmup_fraction: float = 0.03
    """The learning rate rises from 0 over this fraction of the steps."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay is this fraction of the learning rate; 0 turns it off."""
    grad_clip: float = 0.0
    """A gradient's norm is clipped to this; 0 turns clipping off."""
    patience: int = 0
    """Training stops after this many epochs without a better validation loss; 0 trains all epochs."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Each block is recomputed in the backward pass instead of keeping its activations, which takes a third
    more time; auto does it where memory asks for it."""
    compute_dtype: ComputeDtype = "auto"
    """The forward pass computes in this type; auto takes bfloat16 on a GPU and float32 on the CPU."""

    def check_on(self, grid: GridConfig, name: str) -> None:
        check_trained(f"{name}.train", self.train, trainable(self.train, grid), enabled=self.enabled)
        self.check(name)

    def check(self, name: str) -> None:
        check_network(name, self, "lr_weight", "lr_quant")

    def resolved(self, grid: GridConfig) -> Self:
        """Learning rates that were left out follow the scaling; zero points that the grid fixes leave the
        trained set."""
        absolute = self.lr_scaling == "absolute"
        return msgspec.structs.replace(
            self,
            train=trainable(self.train, grid) or (self.train if self.enabled else ()),
            lr_weight=(2e-5 if absolute else 0.01) if self.lr_weight is None else self.lr_weight,
            lr_quant=(2e-5 if absolute else 0.005) if self.lr_quant is None else self.lr_quant,
        )

    @classmethod
    def younger(cls) -> tuple[str, ...]:
        return ("start",)

    @classmethod
    def earlier(cls) -> Mapping[str, Any]:
        return {"text_weight": 0.0}
