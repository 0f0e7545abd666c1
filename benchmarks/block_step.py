"""A Block-AP step, plain and compiled, beside each other in the same run.

    python benchmarks/block_step.py Llama-2-7B SmolLM2-135M

A block of each shape (random weights, w2g64, ranges by minimum and maximum) is trained on random sequences
that lie on the GPU. Each variant trains two blocks one after the other: the first pays for compiling, the
second shows that it is not paid again. The table says what a step took (median of the second block), the peak
of allocated memory beside the activations, how much longer the first block took, and the final loss.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import SHAPES, Clock, model

from engine.data.activations import make_store
from engine.methods.block_ap import Streams, train_block
from engine.run.config import BlockAPConfig, GridConfig
from engine.setup import device_name, package_versions

BATCHES = {"SmolLM2-135M": (4, 1024)}
"""Sequences a step and their length; otherwise (2, 2048)."""


class Losses(Clock):
    """Keeps the loss of every step as well."""

    def step_boundary(self, state: Any) -> None:
        self.stop_asked()


def measure(shape: str, compiles: bool, steps: int) -> list[str]:
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
    stored = torch.cuda.memory_allocated()
    whole, took, peak, final = [], [0.0], 0, 0.0
    for number in range(2):
        block = lm.load_block(0, dtype=torch.float32)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        clock = Losses(device)
        begun = time.perf_counter()
        result = train_block(
            lm,
            0,
            block,
            streams,
            config,
            grid,
            seed=number,
            dtype=torch.bfloat16,
            progress=clock,
            compiles=compiles,
        )
        whole.append(time.perf_counter() - begun)
        took = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
        peak, final = torch.cuda.max_memory_allocated() - stored, result.final_loss
        del block, result
        gc.collect()
    for store in stores:
        store.close()
    name = "compiled" if compiles else "plain"
    return [
        shape,
        name,
        f"{1000 * statistics.median(took[5:]):.2f}",
        f"{peak / 2**30:.2f}",
        f"{whole[0] - whole[1]:.1f}",
        f"{final:.5f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=["Llama-2-7B"], choices=[*SHAPES, []])
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        for compiles in (False, True):
            rows.append(measure(shape, compiles, args.steps))
            print(rows[-1], file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
    print("| block | variant | ms a step | peak GiB | first block longer by, s | final loss |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    packages = package_versions()
    print(
        device_name(torch.device("cuda")), ", ".join(f"{k} {packages[k]}" for k in ("torch", "transformers"))
    )


if __name__ == "__main__":
    main()
