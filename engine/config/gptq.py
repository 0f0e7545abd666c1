"""GPTQ: rounding column by column, in which the columns that are left make up for the error."""

from __future__ import annotations

from typing import Literal

from engine.config import checks
from engine.config.base import ComputeDtype
from engine.config.stage_section import StageSection
from engine.errors import UsageError

CHUNK = 128
"""Columns after which an error reaches those that lie further on."""
VALUES, GPU_VALUES = 1 << 22, 1 << 26
"""Weights that are rounded together, some rows at a time: rows do not know of each other."""
LEAST_DAMPING, MOST_DAMPING = 1e-6, 1.0


class GPTQConfig(StageSection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """GPTQ: rounding that makes up for its own error, without training."""

    enabled: bool = False
    """GPTQ rounds the blocks one after the other, column by column, instead of training them."""
    sequences: int = 128
    """Inputs of linears are measured on this many sequences; where Block-AP starts from GPTQ, on as many of
    its own."""
    sequence_length: int = 2048
    """A sequence has this many tokens."""
    batch_size: int = 4
    """This many sequences pass through a block at a time."""
    damping: float = 0.01
    """The diagonal of a Hessian grows by this fraction of its mean; ten times as much where that is too
    little to invert it."""
    scales: Literal["range", "search"] = "range"
    """A group's scale and zero point are chosen by ``grid.range``, or by a ``search`` for both together that
    weighs errors by the input's squares."""
    compute_dtype: ComputeDtype = "auto"
    """The forward pass computes in this type; auto takes bfloat16 on a GPU and float32 on the CPU."""

    @property
    def val_sequences(self) -> int:
        """Nothing is validated, since nothing is trained."""
        return 0

    def check(self, name: str) -> None:
        checks.count(f"{name}.sequences", self.sequences)
        checks.count(f"{name}.sequence_length", self.sequence_length, least=2)
        checks.count(f"{name}.batch_size", self.batch_size)
        checks.between(f"{name}.damping", self.damping, LEAST_DAMPING, MOST_DAMPING)
        if self.enabled and self.batch_size > self.sequences:
            raise UsageError(
                f"{self.batch_size} is more than {name}.sequences = {self.sequences}",
                where=f"{name}.batch_size",
                hint=f"at most {self.sequences}",
            )
