"""Block-AP: block-wise training of all parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import msgspec

from engine.config import checks
from engine.config.base import ComputeDtype, LearningRateScaling
from engine.config.grid import GridConfig
from engine.config.stage_section import (
    StageSection,
    check_learning_rate,
    check_schedule,
    check_sequences,
    check_trained,
    trainable,
)
from engine.errors import UsageError

Trained = Literal["weights", "scales", "zero_points", "norms", "rounding", "clipping"]
WITHIN: Mapping[Trained, tuple[Trained, ...]] = {
    "rounding": ("weights",),
    "clipping": ("scales", "zero_points"),
}
"""What is trained only in part, and what it is a part of."""


class BlockAPConfig(StageSection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Block-wise training of all parameters (EfficientQAT, section 3.2)."""

    enabled: bool = True
    """Block-AP trains block by block; without it the blocks are only rounded."""
    train: tuple[Trained, ...] = ("weights", "scales", "zero_points", "norms")
    """Block-AP trains these, but for zero points that are fixed; rounding is only which way each weight goes,
    clipping only how much each range is narrowed."""
    sequences: int = 512
    """A block is trained on this many sequences."""
    val_sequences: int = 16
    """The validation loss is measured on this many sequences, from a part of the text that training does not
    see; 0 turns validation off."""
    sequence_length: int = 2048
    """A sequence has this many tokens."""
    batch_size: int = 4
    """An optimizer step sees this many sequences."""
    epochs: int = 2
    """A block is trained for this many passes over the training sequences."""
    loss: Literal["mse", "token_relative_mse"] = "token_relative_mse"
    """The loss is ``mse`` over all outputs, or each token's squared error divided by its target's mean
    square."""
    drop_largest: float = 0.0
    """The loss leaves out this fraction of the squared errors that are computed together, the largest ones; 0
    keeps all."""
    lr_scaling: LearningRateScaling = "relative"
    """``relative`` multiplies a learning rate by each linear's mean initial scale; ``absolute`` does not."""
    lr_weight: float | None = None
    """Weights (when absolute, norms too) learn at this rate; none takes 2e-5 (2 bits) or 1e-5 when absolute,
    0.02 when relative."""
    lr_quant: float | None = None
    """Scales and zero points (when relative, norms too, times their mean) learn at this rate; none takes 1e-4
    when absolute, 0.005 when relative."""
    lr_final_fraction: float = 0.05
    """The cosine schedule ends at this fraction of the initial learning rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay is this fraction of the learning rate; 0 turns it off."""
    grad_clip: float = 0.0
    """A gradient's norm is clipped to this; 0 turns clipping off."""
    patience: int = 0
    """A block stops after this many epochs without a better validation loss; 0 trains all epochs."""
    start: Literal["range", "search", "gptq"] = "range"
    """Scales and zero points start at ``grid.range``, or by a ``search`` that weighs errors by the input's
    squares; with ``gptq`` weights too start where GPTQ ends."""
    compute_dtype: ComputeDtype = "auto"
    """The forward pass computes in this type; auto takes bfloat16 on a GPU and float32 on the CPU."""

    @property
    def trains_parts(self) -> bool:
        """Whether something is trained only in part."""
        return not WITHIN.keys().isdisjoint(self.train)

    def check_on(self, grid: GridConfig, name: str) -> None:
        check_trained(f"{name}.train", self.train, trainable(self.train, grid), enabled=self.enabled)
        if self.enabled:
            self._check_parts(grid, f"{name}.train")
        self.check(name)

    def _check_parts(self, grid: GridConfig, name: str) -> None:
        for part, wholes in WITHIN.items():
            whole = next((one for one in wholes if one in self.train), None)
            if part in self.train and whole is not None:
                raise UsageError(
                    f"{part} is a part of training {whole}", where=name, hint="name one of the two"
                )
        if "clipping" in self.train and grid.fixes_zero_points:
            hint = "scales are what such a grid has to train"
            raise UsageError("clipping moves zero points, and this grid fixes them", where=name, hint=hint)

    def check(self, name: str) -> None:
        check_sequences(name, self)
        check_learning_rate(f"{name}.lr_weight", self.lr_weight)
        check_learning_rate(f"{name}.lr_quant", self.lr_quant)
        check_schedule(name, self)
        checks.between(f"{name}.drop_largest", self.drop_largest, 0.0, 0.5)

    @classmethod
    def younger(cls) -> tuple[str, ...]:
        return ("start", "drop_largest")

    def resolved(self, grid: GridConfig) -> Self:
        """Learning rates that were left out follow bits and scaling. Zero points that the grid fixes leave
        the trained set, of which they are part by default; where nothing else is trained they stay, so that
        a refusal can say why."""
        absolute = self.lr_scaling == "absolute"
        lr_weight = (2e-5 if grid.bits == 2 else 1e-5) if absolute else 0.02
        lr_quant = 1e-4 if absolute else 0.005
        return msgspec.structs.replace(
            self,
            train=trainable(self.train, grid) or (self.train if self.enabled else ()),
            lr_weight=lr_weight if self.lr_weight is None else self.lr_weight,
            lr_quant=lr_quant if self.lr_quant is None else self.lr_quant,
        )
