"""A Block-AP step in all its forms, beside its floor, in the same run.

    python benchmarks/block_step.py Llama-2-7B SmolLM2-135M

A block of each shape (random weights, w2g64, ranges by minimum and maximum) is trained on random sequences
that lie on the GPU:

    plain      torch's kernels one after the other
    compiled   forward, backward and quantizer compiled
    recorded   quantizer and AdamW in one kernel a linear, the step recorded as a graph
    fast       the last two together: what a long run does

Each trains three blocks one after the other; what is measured is the median step of the last two, without
waiting for the GPU in between. "compiling" is by how much the first block took longer, with whatever the
compiler's cache holds. The floor adds up the matrix products at the rate of a large one, the bytes of AdamW
(28 a weight) and of the quantizer (16 a weight) at the bandwidth of a copy, and attention.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import Clock
from common import SHAPES, Linears, attention_ms, bandwidth, matrix_rate, model, table, where

from engine.data.activations import make_store
from engine.methods.block_ap import train_block
from engine.methods.reconstruction import Streams
from engine.run.config import BlockAPConfig, GridConfig

BATCHES = {"SmolLM2-135M": (4, 1024)}
"""Sequences a step and their length; otherwise (2, 2048)."""
VARIANTS = {
    "plain": {},
    "compiled": {"compiles": True},
    "recorded": {"fast": True},
    "fast": {"fast": True, "compiles": True},
}


class Marks(Clock):
    """Marks every step on the GPU's own time line."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.events: list[torch.cuda.Event] = []

    def step_boundary(self, state: Any) -> None:
        self.events.append(torch.cuda.Event(enable_timing=True))
        self.events[-1].record()

    def steps(self) -> list[float]:
        """Milliseconds of every step but the first ones."""
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.events[8:], self.events[9:], strict=False)]


def floor(shape: dict[str, int], batch: int, length: int) -> float:
    """Milliseconds."""
    block = Linears.of(shape)
    products = 6 * block.weights * batch * length / matrix_rate()
    bytes_ = (28 + 16) * block.weights / bandwidth()
    attention = attention_ms(batch, block.heads, block.kv_heads, length, block.head_dim, backward=True)
    return 1e3 * (products + bytes_) + attention


def measure(shape: str, variant: str, steps: int) -> list[str]:
    device, (batch, length) = torch.device("cuda"), BATCHES.get(shape, (2, 2048))
    lm = model(SHAPES[shape], device)
    config = BlockAPConfig(
        sequences=steps * batch,
        val_sequences=0,
        sequence_length=length,
        batch_size=batch,
        epochs=1,
        lr_weight=0.01,
        lr_quant=0.005,
    )
    grid = GridConfig(bits=2, group_size=64, range="minmax")
    generator = torch.Generator(device).manual_seed(0)
    shape_NTH = (steps * batch, length, lm.hidden_size)
    stores = [make_store("device", shape_NTH, lm.dtype, device, None, None) for _ in range(2)]
    for store in stores:
        for row in range(0, shape_NTH[0], batch):
            part = torch.randn(batch, length, lm.hidden_size, device=device, generator=generator)
            store.write(row, part.to(lm.dtype))
    streams = Streams(stores[0], stores[1], shape_NTH[0])
    stored = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    weights = lm.load_block(0, dtype=torch.float32, device=torch.device("cpu"))
    whole: list[float] = []
    took: list[float] = []
    peaks, final = (0, 0), 0.0
    for number in range(3):
        block = copy.deepcopy(weights).to(device)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        marks = Marks(device)
        begun = time.perf_counter()
        result = train_block(
            *(lm, 0, block, streams, config, grid),
            seed=number,
            dtype=torch.bfloat16,
            progress=marks,
            **VARIANTS[variant],
        )
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - begun)
        took += marks.steps() if number else []
        peaks = (
            torch.cuda.max_memory_allocated() - stored[0],
            torch.cuda.max_memory_reserved() - stored[1],
        )
        final = result.final_loss
        del block, result
        gc.collect()
    for store in stores:
        store.close()
    least = floor(SHAPES[shape], batch, length)
    step = statistics.median(took)
    return [
        shape,
        variant,
        f"{step:.2f}",
        f"{least:.2f}",
        f"{step / least:.2f}",
        f"{peaks[0] / 2**30:.2f}",
        f"{peaks[1] / 2**30:.2f}",
        f"{whole[0] - whole[2]:.1f}",
        f"{final:.5f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=["Llama-2-7B"], choices=[*SHAPES, []])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        for variant in args.variants:
            rows.append(measure(shape, variant, args.steps))
            print(rows[-1], file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
    table(
        "block | form | ms a step | floor | ÷ floor | peak GiB | reserved GiB | compiling s | loss",
        rows,
    )
    print(where())


if __name__ == "__main__":
    main()
