"""Every method that trains all blocks together, on one shape: memory and time, as measured and as planned.

    python benchmarks/methods.py

Four layers of a 7B model (random weights), 4 bits a channel, 4 sequences of 1024 tokens a step,
cross-entropy; recorded and compiled, all activations kept:

    E2E-QP     scales on integers that stay; with blocks rounded to nearest, PEQA
    LR-QAT     scales, and factors of rank 32 on latents in one byte (Q4.4) or in bfloat16
    full QAT   weights, scales and norms

and a step of 8 sequences of 1024 tokens on SmolLM2 (2 bits, groups of 64), which is launches and little else.
Each trains ``--repeat`` times, of which the table has the median step (the median of these, and the range).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import DEVICE, SHAPES, device_name, median_of, table, where
from several_steps import Kind, network, planned

from engine.config.grid import GridConfig
from engine.training.world import ALONE

PER_CHANNEL = GridConfig(bits=4, group_size=-1)
FULL = (("start", "latents"), ("train", ("weights", "scales", "norms")))
BFLOAT16 = (("downcast", "bfloat16"),)
FIXED = (("downcast", "fixed"),)


def large(stage: str, changes: tuple[tuple[str, object], ...] = ()) -> Kind:
    """On the shape that is asked for."""
    return Kind(stage, 4, 1024, 12, layers=4, micro=4, grid=PER_CHANNEL, changes=changes)


def small(stage: str) -> Kind:
    return Kind(stage, 8, 1024, 24, layers=30, micro=8, vocabulary=49152, shape="SmolLM2-135M")


KINDS = {
    "E2E-QP": large("e2e_qp"),
    "LR-QAT, Q4.4": large("lr_qat", FIXED),
    "LR-QAT, bfloat16": large("lr_qat", BFLOAT16),
    "full QAT": large("e2e_qat", FULL),
    "E2E-QP, SmolLM2": small("e2e_qp"),
    "E2E-QAT, SmolLM2": small("e2e_qat"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", default="Llama-2-7B", choices=list(SHAPES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--what", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    rows = []
    for name in args.what:
        kind = KINDS[name]
        if args.shape == "tiny":
            kind = dataclasses.replace(kind, layers=2, length=32, steps=6, vocabulary=256, shape="tiny")
        found = network(args, kind, ALONE)
        plan = planned(args, kind, 1, device_name(DEVICE))
        took = statistics.median(found["took"])
        rows.append(
            [
                name,
                f"{median_of(found['took'])} ms",
                f"{plan.ms:.1f} ({100 * (plan.ms / took - 1):+.0f} %)",
                f"{found['peak']:.2f}",
                f"{plan.gib:.2f}",
                f"{found['reserved']:.2f}",
            ]
        )
        print(rows[-1], file=sys.stderr, flush=True)
    table("method | a step | planned ms | peak GiB | planned GiB | reserved GiB", rows)
    print(f"{args.shape}; {where()}")


if __name__ == "__main__":
    main()
