"""A micro-step of E2E-QP in all its forms, beside its floor, in the same run.

    python benchmarks/e2e_step.py Llama-2-7B --layers 2

The engine's own end-to-end training on packed blocks of random weights (w2g64), 4 sequences of 4096 tokens
at a time, with and without recomputation of activations. What a layer costs is the difference between a model
of so many layers and one of half as many; the rest is embedding, head and loss. The floor of a layer adds up
the matrix products (6 or 8 for each weight and token) at the rate of a large one, and attention.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from block_step import Marks
from common import SHAPES, Linears, attention_ms, matrix_rate, model, table, where

from engine.methods.e2e_qp import E2EData, train_scales
from engine.quant.packed import Kernels, PackedBlock, PackedWeight
from engine.run.config import E2EQPConfig


def packed_like(weights: torch.nn.Module, names: tuple[str, ...]) -> PackedBlock:
    """Random integers in the shapes of a block's linears."""
    linears = {}
    for name in names:
        out, inputs = weights.get_submodule(name).weight.shape  # type: ignore[union-attr]
        words = torch.randint(-(2**31), 2**31 - 1, (out, inputs // 16), dtype=torch.int32, device="cuda")
        scale = torch.full((out, inputs // 64), 0.8 * inputs**-0.5, dtype=torch.float16, device="cuda")
        zero = torch.ones(out, inputs // 64, dtype=torch.uint8, device="cuda")
        linears[name] = PackedWeight(words, scale, zero, 2)
    return PackedBlock(linears, {})


@functools.cache
def first(shape: str) -> torch.nn.Module:
    """A block of that shape; random weights are slow to draw, so once will do."""
    return model(SHAPES[shape], torch.device("cuda")).load_block(0)


def measure(
    args: argparse.Namespace, shape: str, layers: int, fast: bool, recompute: bool
) -> tuple[float, float]:
    """Median milliseconds of a micro-step, and the peak of allocated memory in GiB."""
    device = torch.device("cuda")
    lm = model(SHAPES[shape], device, blocks=layers, vocabulary=args.vocabulary)
    Kernels.on = False
    if fast:
        Kernels.switch_on(device)
    blocks = []
    for index in range(layers):
        block = copy.deepcopy(first(shape))
        blocks.append(packed_like(block, lm.linear_names(index)).install(block))
    config = E2EQPConfig(
        sequences=args.steps * args.batch,
        val_sequences=0,
        sequence_length=args.length,
        batch_size=args.batch,
        micro_batch_size=args.batch,
        loss="cross_entropy",
        lr=1e-3,
        activation_checkpointing=recompute,
    )
    tokens = torch.randint(0, args.vocabulary, (config.sequences, args.length))
    marks = Marks(device)
    torch.cuda.reset_peak_memory_stats()
    data = E2EData(tokens, config.sequences, None)
    train_scales(lm, blocks, data, config, seed=0, dtype=torch.bfloat16, progress=marks, compiles=fast)
    torch.cuda.synchronize()
    took = [a.elapsed_time(b) for a, b in zip(marks.events[2:], marks.events[3:], strict=False)]
    peak = torch.cuda.max_memory_allocated() / 2**30
    del lm, blocks
    gc.collect()
    torch.cuda.empty_cache()
    return statistics.median(took), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs="?", default="Llama-2-7B", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    args = parser.parse_args()
    sizes = Linears.of(SHAPES[args.shape])
    tokens = args.batch * args.length
    rows = []
    for fast in (False, True):
        for recompute in (False, True):
            half, whole = (
                measure(args, args.shape, n, fast, recompute) for n in (args.layers // 2, args.layers)
            )
            layer = (whole[0] - half[0]) / (args.layers - args.layers // 2)
            rest = whole[0] - args.layers * layer
            shapes = (args.batch, sizes.heads, sizes.kv_heads, args.length, sizes.head_dim)
            attention = attention_ms(*shapes, backward=True)
            if recompute:
                attention += attention_ms(*shapes, backward=False)
            least = 1e3 * (8 if recompute else 6) * sizes.weights * tokens / matrix_rate() + attention
            head = 1e3 * 4 * tokens * args.vocabulary * SHAPES[args.shape]["hidden_size"] / matrix_rate()
            rows.append(
                [
                    args.shape,
                    "fast" if fast else "plain",
                    "yes" if recompute else "no",
                    *(f"{value:.1f}" for value in (layer, least)),
                    f"{layer / least:.2f}",
                    *(f"{value:.1f}" for value in (rest, head)),
                    f"{whole[1]:.2f}",
                ]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    table("block | form | recomputes | ms a layer | floor | ÷ floor | rest ms | its floor | peak GiB", rows)
    print(where())


if __name__ == "__main__":
    main()
