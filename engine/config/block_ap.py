"""Block-AP: block-wise training of all parameters."""

from __future__ import annotations

from typing import Literal

from engine.config.base import ComputeDtype, LearningRateScaling, Section


class BlockAPConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Block-wise training of all parameters (EfficientQAT, section 3.2)."""

    enabled: bool = True
    """Train block by block; without it the blocks are only rounded."""
    train: tuple[Literal["weights", "scales", "zero_points", "norms"], ...] = (
        "weights",
        "scales",
        "zero_points",
        "norms",
    )
    """What is trained. A symmetric grid has no zero points to train: they are left out then."""
    sequences: int = 512
    """Training sequences."""
    val_sequences: int = 16
    """Validation sequences, from a part of the text that training does not see; 0 turns validation off."""
    sequence_length: int = 2048
    """Tokens per sequence."""
    batch_size: int = 4
    """Sequences per optimizer step."""
    epochs: int = 2
    """Passes over the training sequences, per block."""
    loss: Literal["mse", "token_relative_mse"] = "token_relative_mse"
    """``mse`` over all outputs, or each token's squared error divided by its target's mean square."""
    lr_scaling: LearningRateScaling = "relative"
    """``relative`` multiplies a learning rate by each linear's mean initial scale; ``absolute`` does not."""
    lr_weight: float | None = None
    """Learning rate of weights (when absolute, of norms too); none: 2e-5 (2 bits) or 1e-5 when absolute, 0.02
    when relative."""
    lr_quant: float | None = None
    """Learning rate of scales and zero points (when relative, of norms too, times their mean); none: 1e-4
    when absolute, 0.005 when relative."""
    lr_final_fraction: float = 0.05
    """The cosine schedule ends at this fraction of the initial learning rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, as a fraction of the learning rate; 0 turns it off."""
    grad_clip: float = 0.0
    """Largest gradient norm; 0 turns clipping off."""
    patience: int = 0
    """Stop a block after this many epochs without a better validation loss; 0 trains all epochs."""
    compute_dtype: ComputeDtype = "auto"
    """Arithmetic of the forward pass; auto: bfloat16 on a GPU, float32 on the CPU."""
