"""LR-QAT: low-rank quantization-aware training."""

from __future__ import annotations

from typing import Literal, Self

import msgspec

from engine.config import checks
from engine.config.base import ComputeDtype, LearningRateScaling
from engine.config.grid import GridConfig
from engine.config.latents import Downcast, Start
from engine.config.stage_section import (
    NetworkSection,
    check_network,
    check_trained,
    trainable,
)

Trained = Literal["factors", "scales", "zero_points", "norms"]
LARGEST_RANK = 1024
"""Factors of more are no smaller than the weights of most models."""


class LRQATConfig(NetworkSection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Low-rank quantization-aware training (LR-QAT, section 3)."""

    enabled: bool = False
    """LR-QAT trains integers and scales of the whole model like E2E-QAT, by a product of two thin factors
    beside each frozen weight; it takes 1 to 2 bytes a weight."""
    train: tuple[Trained, ...] = ("factors", "scales")
    """LR-QAT trains these, but for zero points where the grid fixes them. A zero point learns from weights
    outside of the grid, of which ``fixed`` and ``integer`` keep none."""
    rank: int = 32
    """The factors of an m by n weight are m by this, and this by n."""
    alpha: float = 1.0
    """The factors' product counts this over the rank."""
    downcast: Downcast = "fixed"
    """A frozen weight is kept as a ``bfloat16`` or ``float16`` number, in ``fixed`` point (8 bits, of which
    the grid's bits are whole), or as its ``integer`` alone."""
    start: Start = "latents"
    """Frozen weights are the ``latents`` that were rounded (Block-AP's or GPTQ's, without them the original
    weights), or the ``integers``, of which a small change moves none."""
    zero_factor: Literal["a", "b"] = "a"
    """The factor that starts at zero: ``a``, on the side of the outputs, or ``b``, on that of the inputs."""
    factor_start: Literal["kaiming", "svd"] = "kaiming"
    """The other factor starts as noise (``kaiming``) or as the frozen weight's singular vectors (``svd``)."""
    factor_dtype: Literal["float32", "bfloat16"] = "float32"
    """Factors and their moments are kept in this type."""
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
    """``relative`` multiplies the learning rate of scales by each linear's mean initial scale; ``absolute``
    does not."""
    lr_factors: float | None = None
    """Factors, whose product is counted in grid steps, learn at this rate; none takes 1e-3 when absolute and
    0.01 when relative."""
    lr_quant: float | None = None
    """Scales and zero points (and norms, when relative times their mean) learn at this rate; none takes 1e-5
    when absolute, 0.005 when relative."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """After the warm-up the learning rate falls as a ``cosine`` or ``linear``."""
    lr_final_fraction: float = 0.0
    """The schedule ends at this fraction of the initial learning rate."""
    warmup_fraction: float = 0.03
    """The learning rate rises from 0 over this fraction of the steps."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay is this fraction of the learning rate; 0 turns it off."""
    grad_clip: float = 1.0
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
        checks.count(f"{name}.rank", self.rank, most=LARGEST_RANK)
        checks.between(f"{name}.alpha", self.alpha, 1e-6, 1e6)
        check_network(name, self, "lr_factors", "lr_quant")

    def resolved(self, grid: GridConfig) -> Self:
        """Learning rates that were left out follow the scaling; zero points that the grid fixes leave the
        trained set."""
        absolute = self.lr_scaling == "absolute"
        return msgspec.structs.replace(
            self,
            train=trainable(self.train, grid) or (self.train if self.enabled else ()),
            lr_factors=(1e-3 if absolute else 0.01) if self.lr_factors is None else self.lr_factors,
            lr_quant=(1e-5 if absolute else 0.005) if self.lr_quant is None else self.lr_quant,
        )
