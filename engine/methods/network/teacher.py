"""The teacher of a training of the whole network: no second model, only what the full-precision one put out
last, computed once and block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.data.prefetch import Prefetcher
from engine.training.world import ALONE, World

if TYPE_CHECKING:
    from engine.data.activations import ActivationStore


class Teacher:
    """The full-precision model's last hidden states; ``rows`` says where each sequence lies in the store, of
    which this one holds a rank's share."""

    def __init__(self, store: ActivationStore, rows: Tensor | None = None, world: World = ALONE) -> None:
        self.store, self._rows, self._world = store, rows, world
        self._prefetch = Prefetcher((store,))

    def read(self, rows: Tensor) -> Tensor:
        """Hidden states ``[len(rows), T, H]`` of the given sequences, on the device."""
        (hidden_BTH,) = self._prefetch.read(self._places(rows))
        return hidden_BTH

    def expect(self, rows: Tensor) -> None:
        """They will be read next."""
        self._prefetch.expect(self._places(rows))

    def _places(self, rows: Tensor) -> Tensor:
        return self._world.places(rows if self._rows is None else self._rows[rows])

    def close(self) -> None:
        """Give the hidden states back."""
        self._prefetch.close()
        self.store.close()


def positions(wanted: Tensor, present: Tensor) -> Tensor | None:
    """Where each row of ``wanted`` is among the rows of ``present``; none unless all of them are there."""
    if wanted.shape[1:] != present.shape[1:]:
        return None
    known = {row.numpy().tobytes(): index for index, row in enumerate(present.contiguous())}
    found = [known.get(row.numpy().tobytes()) for row in wanted.contiguous()]
    return None if None in found else torch.tensor(found)
