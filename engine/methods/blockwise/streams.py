"""What Block-AP carries from block to block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.data.activations import ActivationStore


@dataclass(frozen=True)
class Streams:
    """The two activation streams ``[N, T, H]``: ``train`` training sequences, then the validation
    sequences."""

    full: ActivationStore
    quantized: ActivationStore
    train: int

    @property
    def sequences(self) -> int:
        return self.full.shape[0]
