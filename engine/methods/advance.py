"""An activation stream moves one block on, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.data.prefetch import READ_AHEAD, InPlace
from engine.quant.packed import unpacked
from engine.training.loop import OTHERS_HINT
from engine.training.precision import autocast
from engine.training.progress import Progress

if TYPE_CHECKING:
    from engine.data.activations import ActivationStore
    from engine.models.causal_lm import CausalLM


class Portions:
    """How many sequences pass through a block at a time, at every point of a stream's way.

    When the GPU's memory does not suffice the number is halved from there on. Products of other sizes have
    other last bits, so where that happened is kept: a stream that is computed again must come out the same.
    """

    def __init__(self, batch: int, halvings: Iterable[Sequence[int]] = ()) -> None:
        self.batch = batch
        self.halvings = [(int(block), int(row)) for block, row in halvings]
        """Block and first sequence from which only half as many pass."""

    def at(self, block: int, row: int) -> int:
        """Sequences at a time."""
        return max(1, self.batch >> sum(halving <= (block, row) for halving in self.halvings))

    def ranges(self, block: int, row: int, end: int) -> list[range]:
        """The next sequences from ``row`` on, and what comes after them."""
        found: list[range] = []
        while row < end and len(found) < 1 + READ_AHEAD:
            found.append(range(row, min(row + self.at(block, row), end)))
            row = found[-1].stop
        return found

    def halve(self, block: int, row: int) -> None:
        """Only half as many from here on."""
        self.halvings.append((block, row))


@torch.no_grad()
def advance(
    lm: CausalLM,
    index: int,
    block: nn.Module,
    stream: ActivationStore,
    portions: Portions,
    dtype: torch.dtype,
    progress: Progress,
    positions_NT: Tensor | None = None,
) -> None:
    """Replace a stream by the block's output on it, batch by batch, in place. Positions are those of packed
    samples, none where windows are one text.

    A stop may come between two batches and leave the stream half advanced: it is rebuilt on resume.
    """
    start, end = 0, stream.shape[0]
    with _converted(block, dtype), unpacked(block, dtype), InPlace(stream) as carried:
        while start < end:
            progress.leave_if_asked()
            rows, *following = portions.ranges(index, start, end)
            batch = portions.at(index, start)
            try:
                hidden = carried.read(rows, following)
                with autocast(lm.device, dtype):
                    output = lm.run_block(
                        block, index, hidden, often=len(rows) == batch, positions_BT=_of(positions_NT, rows)
                    )
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            else:
                carried.write(start, output)
                start = rows.stop
                continue
            # After the handler: its traceback holds the tensors that have to go.
            torch.cuda.empty_cache()
            portions.halve(index, start)
            progress.warning(
                "micro_batch",
                f"block {index}: out of memory with {batch} sequences at a time; going on with {batch // 2}",
                hint=OTHERS_HINT,
            )


def _of(positions_NT: Tensor | None, rows: range) -> Tensor | None:
    return None if positions_NT is None else positions_NT[rows.start : rows.stop]


@contextmanager
def _converted(block: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, weights of linears are in the arithmetic's dtype; autocast would convert them for every
    batch."""
    layers = [m for m in block.modules() if isinstance(m, nn.Linear) and m.weight.dtype != dtype]
    kept = [layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight = weight
