"""A progress that listens: what a method reported, and switches to make it due or stop; as a keeper it keeps
nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.errors import StopRequested
from engine.methods.advance import Portions, advance
from engine.methods.blockwise.block_ap import BlockResult, train_block
from engine.methods.blockwise.reconstruction import Streams
from engine.models.causal_lm import CausalLM
from engine.training.snapshot import Snapshot


class Heard:
    def __init__(self, due: bool = False, stop_at: int | None = None) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.warnings: list[tuple[str, str]] = []
        self.boundaries = 0
        self._due, self._stop_at = due, stop_at

    def due(self) -> bool:
        return self._due

    def metric(self, **values: Any) -> None:
        self.metrics.append(values)

    def warning(self, code: str, message: str, hint: str = "") -> None:
        self.warnings.append((code, message))

    def leave_if_asked(self) -> None:
        self.boundaries += 1
        if self.boundaries == self._stop_at:
            raise StopRequested

    def expect_silence(self, seconds: float) -> None:
        pass

    def wants_state(self) -> bool:
        return False

    def step_boundary(self, state: Callable[[], Snapshot] | None) -> None:
        self.leave_if_asked()


def one_block(
    lm: CausalLM,
    index: int,
    streams: Streams,
    config: BlockAPConfig,
    grid: GridConfig,
    *,
    progress: Heard,
    **options: Any,
) -> BlockResult:
    """Train a block and bring both streams past it, as a run does."""
    block = lm.load_block(index, dtype=torch.float32)
    portions = Portions(config.batch_size)
    advance(lm, index, block, streams.full, portions, options["dtype"], progress)
    result = train_block(lm, index, block, streams, config, grid, progress=progress, **options)
    advance(lm, index, block, streams.quantized, portions, options["dtype"], progress)
    return result
