"""Perplexity against what the matrix products alone would take.

    python benchmarks/evaluation.py Llama-2-7B

Windows of random tokens through a few blocks of random weights by the engine's own evaluation: by torch's
kernels one after the other, then with blocks and head compiled as in a long run; at full precision and packed
(w2g64) with the blocks in memory, and read from a file each time as a run does. "of the products" is the part
of the time that the matrix products of blocks and head would take at the rate of a large one; attention is on
top of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    DEVICE,
    SHAPES,
    Linears,
    attention_ms,
    compile_passages,
    dtype,
    matrix_rate,
    median_of,
    model,
    packed_like,
    peak_gib,
    reset_peak,
    seconds,
    table,
    where,
)
from recipe import Fresh

from engine.evaluation.perplexity import perplexity
from engine.quant.packed import Kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("shape", nargs="?", default="Llama-2-7B", choices=list(SHAPES))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--windows", type=int, default=166)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    lm = model(SHAPES[args.shape], blocks=args.blocks, vocabulary=args.vocabulary)
    if DEVICE.type == "cuda":
        Kernels.switch_on(DEVICE)
    ids = torch.randint(0, args.vocabulary, (args.windows, args.length))
    sizes, tokens = Linears.of(SHAPES[args.shape]), ids.numel()
    head = args.vocabulary * lm.hidden_size
    products = 2 * tokens * (args.blocks * sizes.weights + head) / matrix_rate()
    shapes = (args.batch, sizes.heads, sizes.kv_heads, args.length, sizes.head_dim)
    attention = attention_ms(*shapes, backward=False) / 1e3 * args.blocks * args.windows / args.batch
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        fresh = Fresh(args.shape, Path(folder))
        full = fresh.block(dtype())
        packed = fresh.block(dtype())
        packed = packed_like(packed, lm.linear_names(0)).install(packed)
        forms: dict[str, Callable[[int], nn.Module]] = {
            "plain, full precision": lambda index: full,
            "full precision": lambda index: full,
            "packed": lambda index: packed,
            "full precision, read from a file": lambda index: fresh.block(dtype()),
        }
        for name, block_for in forms.items():
            if not name.startswith("plain"):
                compile_passages(lm)
            perplexity(lm, block_for, ids[: args.batch], batch_size=args.batch)
            reset_peak()
            took = [
                seconds(lambda made=block_for: perplexity(lm, made, ids, batch_size=args.batch))  # type: ignore[misc]
                for _ in range(args.repeat)
            ]
            rows.append(
                [
                    name,
                    median_of(took, ".3f"),
                    f"{products:.3f}",
                    f"{attention:.3f}",
                    f"{products / statistics.median(took):.0%}",
                    f"{peak_gib():.2f}",
                ]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    table(f"{args.shape} | seconds | products | attention | of the products | peak GiB", rows)
    print(
        f"{args.blocks} blocks, {args.windows} windows of {args.length} tokens, {args.batch} at a time, "
        f"vocabulary {args.vocabulary}; {where()}"
    )


if __name__ == "__main__":
    main()
