"""Weights that are made up, so that everything can be tried without downloading anything."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from engine.models.skeleton import initial_vectors
from engine.system.stamps import StampedFile


class RandomReader:
    """Weights that are made up, the same for the same seed, each tensor on its own.

    Matrices are normal with variance 1/in, so that every block changes its input noticeably and an
    error anywhere shows in the logits; vectors keep the value the architecture starts them with.
    """

    def __init__(self, config: PreTrainedConfig, seed: int = 0) -> None:
        self._shapes, self._vectors = initial_vectors(config)
        self._seed = seed

    def names(self) -> list[str]:
        return sorted(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def where(self, name: str) -> str:
        return "random weights"

    def files(self) -> list[StampedFile]:
        return []

    def inventory(self) -> list[str]:
        return [f"{name} {shape} seed {self._seed}" for name, shape in sorted(self._shapes.items())]

    def load(self, name: str) -> Tensor:
        if name in self._vectors:
            return self._vectors[name].clone()
        shape = self.shape(name)
        generator = torch.Generator().manual_seed(_name_seed(self._seed, name))
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5


def _name_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")
