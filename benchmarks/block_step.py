"""A Block-AP step in all its forms, beside its floor, in the same run.

    python benchmarks/block_step.py Llama-2-7B SmolLM2-135M

A block of each shape (random weights, w2g64, ranges by minimum and maximum) is trained on random sequences
that lie on the GPU:

    plain      torch's kernels one after the other
    compiled   forward, backward and quantizer compiled
    recorded   quantizer and AdamW in one kernel a linear, the step recorded as a graph
    fast       the last two together: what a long run does

Each trains one block and then ``--repeat`` more, of which the table has the median step: the median of
these, and the range. Nothing waits for the GPU in between. "compiling" is by how much the first block took
longer, with whatever the compiler's cache holds. The floor adds up the matrix products at the rate of a large
one, the bytes of AdamW (28 a weight) and of the quantizer (16 a weight) at the bandwidth of a copy, and
attention.
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
from common import (
    DEVICE,
    GIB,
    SHAPES,
    Linears,
    Marks,
    Profiled,
    allocated,
    attention_ms,
    bandwidth,
    dtype,
    matrix_rate,
    median_of,
    model,
    peak_gib,
    random_block,
    random_store,
    reset_peak,
    synchronize,
    table,
    where,
)

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.methods.blockwise.block_ap import BlockResult, train_block
from engine.methods.blockwise.reconstruction import Streams

BATCHES = {"SmolLM2-135M": (4, 1024), "tiny": (2, 32)}
"""Sequences a step and their length; otherwise (2, 2048)."""
GRID = GridConfig(bits=2, group_size=64, range="minmax")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compiles": True},
    "recorded": {"fast": True},
    "fast": {"fast": True, "compiles": True},
}


def floor(shape: str, batch: int, length: int) -> float:
    """Milliseconds of a step."""
    block = Linears.of(SHAPES[shape])
    products = 6 * block.weights * batch * length / matrix_rate()
    bytes_ = (28 + 16) * block.weights / bandwidth()
    attention = attention_ms(batch, block.heads, block.kv_heads, length, block.head_dim, backward=True)
    return 1e3 * (products + bytes_) + attention


def settings(sequences: int, batch: int, length: int, epochs: int = 1, val: int = 0) -> BlockAPConfig:
    """What a training of one block is given."""
    return BlockAPConfig(
        sequences=sequences,
        val_sequences=val,
        sequence_length=length,
        batch_size=batch,
        epochs=epochs,
        lr_weight=0.01,
        lr_quant=0.005,
    )


def measure(
    shape: str, variants: list[str], steps: int, repeat: int, profiled: bool = False
) -> list[list[str]]:
    batch, length = BATCHES.get(shape, (2, 2048))
    lm = model(SHAPES[shape])
    sequences = steps * batch
    streams = Streams(
        random_store("device", sequences, length, lm.hidden_size, 0),
        random_store("device", sequences, length, lm.hidden_size, 1),
        sequences,
    )
    stored = allocated()
    rows = []

    def train(variant: str, seed: int, marks: Marks) -> BlockResult:
        block = copy.deepcopy(random_block(shape)).to(DEVICE)
        reset_peak()
        return train_block(
            *(lm, 0, block, streams, settings(sequences, batch, length), GRID),
            seed=seed,
            dtype=dtype(),
            progress=marks,
            keeper=marks,
            **VARIANTS[variant],
        )

    for variant in variants:
        whole: list[float] = []
        took: list[float] = []
        peak, reserved, final = 0.0, 0, 0.0
        for number in range(1 + repeat):
            marks = Marks()
            begun = time.perf_counter()
            result = train(variant, number, marks)
            synchronize()
            whole.append(time.perf_counter() - begun)
            if number:
                took.append(statistics.median(marks.steps()))
            peak, final = peak_gib(stored), result.final_loss
            reserved = torch.cuda.max_memory_reserved() - stored if DEVICE.type == "cuda" else 0
            del result
            gc.collect()
        if profiled:
            train(variant, 0, Profiled(steps - 4))
        least = floor(shape, batch, length)
        rows.append(
            [
                shape,
                variant,
                median_of(took),
                f"{least:.2f}",
                f"{statistics.median(took) / least:.2f}",
                f"{peak:.2f}",
                f"{reserved / GIB:.2f}",
                f"{whole[0] - statistics.median(whole[1:]):.1f}",
                f"{final:.5f}",
            ]
        )
        print(rows[-1], file=sys.stderr, flush=True)
    for store in (streams.full, streams.quantized):
        store.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("shapes", nargs="*", default=["Llama-2-7B"], choices=[*SHAPES, []])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--profile", action="store_true", help="list a step's kernels, beside the table")
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        rows += measure(shape, args.variants, args.steps, args.repeat, args.profile)
        random_block.cache_clear()
    table(
        "block | form | ms a step | floor | ÷ floor | peak GiB | reserved GiB | compiling s | loss",
        rows,
    )
    print(where())


if __name__ == "__main__":
    main()
