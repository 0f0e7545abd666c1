"""A micro-step of E2E-QP or LR-QAT in all its forms, beside its floor, in the same run.

    python benchmarks/e2e_step.py Llama-2-7B --profile
    python benchmarks/e2e_step.py Llama-2-7B --method lr_qat --layers 32 --length 1024 --recompute yes

The engine's own end-to-end training on packed blocks of random weights (w2g64), 4 sequences of 4096 tokens
at a time and four times for a step of AdamW (a recipe's batch is 32 sequences), with and without
recomputation of activations. A micro-step is a quarter of such a step. The rest is embedding, head and loss,
measured between marks on the GPU's own time line; everything else, AdamW included, is shared among layers.
The floor of a layer adds up the matrix products (6 or 8 for each weight and token) at the rate of a large
one, and attention; that of the rest its products (4 for each number of the head and token, 6 with a teacher)
and its logits (written, read twice and their gradient written, 2 bytes each).

LR-QAT is that of 4 bits a channel, latents Q4.4, rank 32. To its floor belong the making of every weight in
each pass (a byte read, two written), of its gradient (two bytes read and written, and read by two products),
and the factors' own products.

``--profile`` lists the kernels of a fast step (all its micro-steps) that take longest.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    DEVICE,
    SHAPES,
    Linears,
    Profiled,
    attention_ms,
    bandwidth,
    between,
    dtype,
    mark,
    matrix_rate,
    median_of,
    model,
    packed_block,
    peak_gib,
    random_block,
    random_store,
    reset_peak,
    table,
    where,
)
from torch import nn

from engine.config.e2e_qp import E2EQPConfig
from engine.config.grid import GridConfig
from engine.config.lr_qat import LRQATConfig
from engine.methods.blockwise.rtn import round_to_nearest
from engine.methods.network.e2e_qp import train_scales
from engine.methods.network.head_loss import HeadLoss
from engine.methods.network.lr_qat import low_rank_linears, train_factors
from engine.methods.network.network import NetworkData
from engine.methods.network.teacher import Teacher
from engine.quant.fake_linear import latent_linears, steps_of
from engine.quant.low_rank import Kernel
from engine.quant.packed import Kernels
from engine.quant.slots import slots

SKIPPED = 2
"""First steps, in which things are compiled and memory is found."""
PER_CHANNEL = GridConfig(bits=4, group_size=-1)
ACCUMULATED = 4
"""Micro-steps of a step."""


class Timed:
    """A function whose every call is marked."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._calls: list[tuple[Any, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin = mark()
        result = self._function(*args, **kwargs)
        self._calls.append((begin, mark()))
        return result

    def median(self) -> float:
        """Milliseconds of a call; those of the first steps are left out."""
        return statistics.median(between(*call) for call in self._calls[SKIPPED * ACCUMULATED :])


def measure(
    args: argparse.Namespace, layers: int, fast: bool, recompute: bool, profiled: bool = False
) -> tuple[float, float, float]:
    """Median milliseconds of a layer and of the rest of a micro-step; peak of allocated memory in GiB."""
    lm = model(SHAPES[args.shape], blocks=layers, vocabulary=args.vocabulary)
    Kernels.on = Kernel.on = False
    if fast and DEVICE.type == "cuda":
        Kernels.switch_on(DEVICE)
        Kernel.switch_on(DEVICE)
    sizes = {
        "sequences": args.steps * ACCUMULATED * args.batch,
        "val_sequences": 0,
        "sequence_length": args.length,
        "batch_size": ACCUMULATED * args.batch,
        "micro_batch_size": args.batch,
        "loss": args.loss,
    }
    config: E2EQPConfig | LRQATConfig
    if args.method == "lr_qat":
        config = LRQATConfig(enabled=True, downcast="fixed", text_weight=0.0, **sizes).resolved(PER_CHANNEL)
        first, beside = low_rank_block(args.shape, config, seed=0), 0
        blocks = [first, *(copy.deepcopy(first) for _ in range(layers - 1))]
    else:
        config = E2EQPConfig(lr=1e-3, **sizes)
        first = packed_block(args.shape)
        beside = sum(tensor.nbytes for tensor in first.state_dict().values())
        blocks = [copy.deepcopy(first) for _ in range(layers)]
    tokens = torch.randint(0, args.vocabulary, (config.sequences, args.length))
    teacher = None
    if args.loss == "kl":
        teacher = Teacher(random_store("device", config.sequences, args.length, lm.hidden_size, 0))
    marks = Profiled(args.steps - 2 if profiled else None)
    embed, head = Timed(lm.embed), Timed(HeadLoss.gradient)
    reset_peak()
    with (
        mock.patch.object(lm, "embed", embed),
        mock.patch.object(HeadLoss, "gradient", lambda *arguments: head(*arguments)),
    ):
        common = {"seed": 0, "dtype": dtype(), "progress": marks, "keeper": marks, "recompute": recompute}
        data = NetworkData(tokens, config.sequences, teacher)
        if isinstance(config, LRQATConfig):
            train_factors(lm, blocks, data, config, compiles=fast, **common)
        else:
            train_scales(lm, blocks, data, config, compiles=fast, **common)
    whole = statistics.median(marks.steps(SKIPPED)) / ACCUMULATED
    rest = embed.median() + head.median()
    peak = peak_gib(beside)
    del lm, blocks
    if teacher is not None:
        teacher.close()
    gc.collect()
    return (whole - rest) / layers, rest, peak


def low_rank_block(shape: str, config: LRQATConfig, seed: int) -> nn.Module:
    """A random block, rounded, whose linears are latents and factors."""
    block = copy.deepcopy(random_block(shape)).to(DEVICE)
    names = model(SHAPES[shape]).linear_names(0)
    packed = round_to_nearest(copy.deepcopy(block), names, PER_CHANNEL)
    latents = {
        slot.name: steps_of(slot.linear().weight.detach(), packed.linears[slot.name].scale)
        for slot in slots(block, packed.linears)
    }
    block = block.to(dtype())
    low_rank_linears(block, latent_linears(block, packed, latents), config, seed)
    return block


def floors(args: argparse.Namespace, recompute: bool) -> tuple[float, float]:
    """Milliseconds of a layer, and of embedding, head and loss."""
    sizes, tokens = Linears.of(SHAPES[args.shape]), args.batch * args.length
    shapes = (args.batch, sizes.heads, sizes.kv_heads, args.length, sizes.head_dim)
    attention = attention_ms(*shapes, backward=True)
    if recompute:
        attention += attention_ms(*shapes, backward=False)
    layer = 1e3 * (8 if recompute else 6) * sizes.weights * tokens / matrix_rate() + attention
    if args.method == "lr_qat":
        made, rank = 3 if recompute else 2, LRQATConfig().rank
        layer += 1e3 * sizes.weights * (3 * made + 8) / bandwidth()
        layer += 1e3 * sizes.weights * 2 * rank * (made + 2) / matrix_rate()
    logits = tokens * args.vocabulary
    taught = args.loss == "kl"
    products = (6 if taught else 4) * logits * SHAPES[args.shape]["hidden_size"] / matrix_rate()
    return layer, 1e3 * (products + 2 * (7 if taught else 4) * logits / bandwidth())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("shape", nargs="?", default="Llama-2-7B", choices=list(SHAPES))
    parser.add_argument("--method", choices=["e2e_qp", "lr_qat"], default="e2e_qp")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--loss", choices=["cross_entropy", "kl"], default="cross_entropy")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--forms", nargs="*", choices=["plain", "fast"], default=["plain", "fast"])
    parser.add_argument("--recompute", nargs="*", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    rows = []
    for form in args.forms:
        for recompute in (choice == "yes" for choice in args.recompute):
            layers, rest, peak = [], [], 0.0
            for _ in range(args.repeat):
                layer, other, peak = measure(args, args.layers, form == "fast", recompute)
                layers.append(layer)
                rest.append(other)
            least, least_rest = floors(args, recompute)
            rows.append(
                [
                    args.shape,
                    form,
                    "yes" if recompute else "no",
                    median_of(layers, ".1f"),
                    f"{least:.1f}",
                    f"{statistics.median(layers) / least:.2f}",
                    median_of(rest, ".1f"),
                    f"{least_rest:.1f}",
                    f"{peak:.2f}",
                ]
            )
            print(rows[-1], file=sys.stderr, flush=True)
            if args.profile and form == "fast":
                measure(args, args.layers, True, recompute, profiled=True)
    table("block | form | recomputes | ms a layer | floor | ÷ floor | rest ms | its floor | peak GiB", rows)
    sizes = f"{args.batch} x {args.length} tokens, vocabulary {args.vocabulary}"
    print(f"{args.method}, {sizes}, {args.loss}; {where()}")


if __name__ == "__main__":
    main()
