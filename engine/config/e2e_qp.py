"""E2E-QP: end-to-end training of quantization parameters."""

from __future__ import annotations

from typing import Literal

from engine.config.base import ComputeDtype, LearningRateScaling, Section


class E2EQPConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """End-to-end training of quantization parameters (EfficientQAT, section 3.3)."""

    enabled: bool = True
    """Train the scales of the whole model after its blocks."""
    train: tuple[Literal["scales", "zero_points"], ...] = ("scales",)
    """What is trained; the integers are fixed."""
    sequences: int = 512
    """Training sequences."""
    val_sequences: int = 16
    """Validation sequences; 0 turns validation off and keeps the last state."""
    sequence_length: int = 2048
    """Tokens per sequence."""
    batch_size: int = 8
    """Sequences per optimizer step (effective, over all ranks and micro-batches)."""
    micro_batch_size: int = 1
    """Sequences per forward and backward pass."""
    epochs: int = 1
    """Passes over the training sequences."""
    loss: Literal["cross_entropy", "kl"] = "kl"
    """Next-token cross-entropy, or KL divergence to the full-precision model's prediction."""
    lr_scaling: LearningRateScaling = "relative"
    """As in ``block_ap``."""
    lr: float | None = None
    """Learning rate; none: 2e-5 (2 bits) or 1e-5 when absolute, 0.005 when relative."""
    lr_final_fraction: float = 0.0
    """The cosine schedule ends at this fraction of the initial learning rate."""
    warmup_fraction: float = 0.03
    """Part of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, as a fraction of the learning rate; 0 turns it off."""
    grad_clip: float = 0.3
    """Largest gradient norm; 0 turns clipping off."""
    patience: int = 0
    """Stop after this many epochs without a better validation loss; 0 trains all epochs."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute each block in the backward pass instead of keeping its activations, which takes a third more
    time; auto: where memory asks for it."""
    compute_dtype: ComputeDtype = "auto"
    """As in ``block_ap``."""
