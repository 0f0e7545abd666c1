"""What a whole recipe takes on this machine, from two of its blocks and four of its layers.

    python benchmarks/recipe.py Llama-2-7B
    python benchmarks/recipe.py Llama-2-70B --sequences 64
    python benchmarks/recipe.py Llama-2-7B --store disk        # a second time: what the disk costs

The recipe is the published one (4096 sequences of 2048 tokens, batch 2, 2 epochs, 64 for validation; then
4096 of 4096), on random weights and numbers of the true shapes. Two blocks go through everything that a run
does with a block, by its own functions, on fewer sequences; the second is what counts, since the first
compiles. What depends on the number of sequences is multiplied:

    read       the block's file, written beforehand, as float32 on the device
    pass       full-precision and quantized stream through the block, for each sequence
    step       a step of Block-AP
    around     ranges, losses reported and validated, rounding: what training takes beside its steps
    save       packing the block and publishing it as a checkpoint

Then a micro-step of E2E-QP on four layers, and perplexity on 166 windows of 2048 tokens, four
times.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import e2e_step
from block_step import GRID, settings
from common import (
    DEVICE,
    GIB,
    SHAPES,
    Linears,
    Marks,
    allocated,
    compile_passages,
    dtype,
    model,
    packed_block,
    peak_gib,
    random_block,
    random_store,
    reset_peak,
    seconds,
    synchronize,
    table,
    where,
)

from engine.checkpoints.store import CheckpointStore
from engine.config.block_ap import BlockAPConfig
from engine.data.activations import ActivationStore
from engine.evaluation.perplexity import perplexity
from engine.methods.advance import Portions, advance
from engine.methods.blockwise.block_ap import train_block
from engine.methods.blockwise.reconstruction import Streams
from engine.models.causal_lm import CausalLM

BLOCKS = {"Llama-2-7B": 32, "Llama-3-8B": 32, "Llama-2-13B": 40, "Llama-2-70B": 80, "SmolLM2-135M": 30}
TRAIN, VALIDATION, EPOCHS, BATCH = 4096, 64, 2, 2
E2E_SEQUENCES = 4096
LAYERS = 4
WINDOWS = 166
"""Of WikiText-2's test split, 2048 tokens each."""


class Fresh:
    """Blocks as a run gets them: read from a file each time."""

    def __init__(self, shape: str, folder: Path) -> None:
        self.file = folder / "block.safetensors"
        self._template = random_block(shape)
        save_file({n: p.detach().to(torch.bfloat16) for n, p in self._template.named_parameters()}, self.file)

    def block(self, wanted: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            block = type(self._template)(self._template.self_attn.config, 0)  # type: ignore[call-arg,union-attr]
        for name, tensor in load_file(self.file).items():
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(tensor.to(device=DEVICE, dtype=wanted), requires_grad=False)
            setattr(block.get_submodule(owner), leaf, value)
        return block.eval()


def one_block(
    lm: CausalLM,
    fresh: Fresh,
    streams: Streams,
    config: BlockAPConfig,
    folder: Path,
    number: int,
    profile: bool = False,
) -> dict[str, float]:
    """Seconds of everything that happens to a block."""
    took: dict[str, float] = {}
    block: nn.Module = nn.Module()

    def read() -> None:
        nonlocal block
        block = fresh.block(torch.float32)

    def move(stream: ActivationStore) -> float:
        portions, marks = Portions(BATCH), Marks()
        whole = seconds(lambda: advance(lm, 0, block, stream, portions, dtype(), marks))
        return whole / streams.sequences

    took["read"] = seconds(read)
    took["pass full"] = move(streams.full)
    beside = allocated()
    reset_peak()
    marks = Marks()
    begun = time.perf_counter()
    with profiled(profile):
        result = train_block(
            *(lm, 0, block, streams, config, GRID),
            seed=number,
            dtype=dtype(),
            progress=marks,
            keeper=marks,
            fast=DEVICE.type == "cuda",
            compiles=DEVICE.type == "cuda",
        )
        synchronize()
    whole = time.perf_counter() - begun
    steps = marks.steps()
    took["step"] = statistics.median(steps) / 1e3
    took["around"] = whole - took["step"] * config.epochs * config.sequences / BATCH
    took["peak"] = peak_gib(beside) + sum(p.nbytes for p in fresh.block(torch.float32).parameters()) / GIB
    store = CheckpointStore(folder / f"checkpoint-{number}", {"what": "benchmark"})

    def save() -> None:
        store.put("block", result.packed.tensors())
        store.commit()

    took["save"] = seconds(save)
    took["pass quantized"] = move(streams.quantized)
    return took


@contextmanager
def profiled(wanted: bool) -> Iterator[None]:
    """Lists what the host waited for in the context."""
    if not wanted:
        yield
        return
    profile = cProfile.Profile()
    with profile:
        yield
    pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(
        "engine|torch._C|method", 45
    )


def evaluate(lm: CausalLM, fresh: Fresh, windows: int, length: int) -> tuple[float, float]:
    """Seconds of one block on the windows, read ahead as in a run, and of all that is not blocks."""
    ids = torch.randint(0, lm.vocab_size, (windows, length))
    made = lambda index: fresh.block(dtype())  # noqa: E731
    perplexity(lm, made, ids[:4], batch_size=4)
    marks: list[float] = []

    def told(done: int, blocks: int) -> None:
        synchronize()
        marks.append(time.perf_counter())

    whole = seconds(lambda: perplexity(lm, made, ids, batch_size=4, on_progress=told))
    one = marks[1] - marks[0]
    return one, whole - one * lm.blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("shape", nargs="?", default="Llama-2-7B", choices=list(SHAPES))
    parser.add_argument("--sequences", type=int, default=256, help="that blocks are trained on here")
    parser.add_argument("--validation", type=int, default=VALIDATION)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--store", choices=["device", "host", "disk"], default="device")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--e2e-batch", type=int, default=4)
    parser.add_argument("--e2e-length", type=int, default=4096)
    parser.add_argument("--recompute", choices=["no", "yes"], default="no")
    parser.add_argument(
        "--profile", action="store_true", help="the host's part of the second block, which then takes longer"
    )
    parser.add_argument("--only", choices=["block_ap"], help="leave E2E-QP and perplexity out")
    args = parser.parse_args()
    blocks = BLOCKS.get(args.shape, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lm = model(SHAPES[args.shape], blocks=2, vocabulary=args.vocabulary)
        if DEVICE.type == "cuda":
            compile_passages(lm)
        fresh = Fresh(args.shape, folder)
        if not args.only:
            packed_block(args.shape)  # for later; its weights are slow to draw
        random_block.cache_clear()
        count = args.sequences + args.validation
        streams = Streams(
            *(
                random_store(args.store, count, args.length, lm.hidden_size, seed, folder / f"{seed}.bin")
                for seed in (0, 1)
            ),
            args.sequences,
        )
        config = settings(args.sequences, BATCH, args.length, EPOCHS, args.validation)
        first = one_block(lm, fresh, streams, config, folder, 0)
        second = one_block(lm, fresh, streams, config, folder, 1, args.profile)
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        streams.full.close()
        streams.quantized.close()
        gc.collect()
        print_block_ap(args, blocks, first, second, host)
        if args.only:
            print(where())
            return
        evaluation = evaluate(lm, fresh, args.windows, args.length)
    del lm, fresh
    gc.collect()
    print_whole(args, blocks, second, evaluation, *end_to_end(args))
    print(where())


def end_to_end(args: argparse.Namespace) -> tuple[float, float, float]:
    """Milliseconds of a layer and of the rest of a micro-step, and its peak in GiB."""
    options: Any = SimpleNamespace(
        method="e2e_qp",
        shape=args.shape,
        vocabulary=args.vocabulary,
        steps=5,
        batch=args.e2e_batch,
        length=args.e2e_length,
        loss="cross_entropy",
    )
    fast = DEVICE.type == "cuda"
    return e2e_step.measure(options, LAYERS, fast, args.recompute == "yes")


def block_seconds(took: dict[str, float]) -> dict[str, float]:
    """Of a block in the whole recipe."""
    return {
        "read": took["read"],
        "pass": (TRAIN + VALIDATION) * (took["pass full"] + took["pass quantized"]),
        "step": EPOCHS * TRAIN / BATCH * took["step"],
        "around": took["around"],
        "save": took["save"],
    }


def print_block_ap(
    args: argparse.Namespace, blocks: int, first: dict[str, float], second: dict[str, float], host: float
) -> None:
    whole = block_seconds(second)
    sequences = TRAIN + VALIDATION
    rows = [
        ["read", f"{second['read']:.2f} s", "1", f"{whole['read']:.1f}"],
        [
            "pass",
            f"{1e3 * second['pass full']:.2f} + {1e3 * second['pass quantized']:.2f} ms a sequence",
            f"{sequences}",
            f"{whole['pass']:.1f}",
        ],
        [
            "step",
            f"{1e3 * second['step']:.2f} ms",
            f"{EPOCHS} x {TRAIN} / {BATCH}",
            f"{whole['step']:.1f}",
        ],
        ["around", f"{second['around']:.2f} s", "1", f"{whole['around']:.1f}"],
        ["save", f"{second['save']:.2f} s", "1", f"{whole['save']:.1f}"],
        ["a block", "", "", f"{sum(whole.values()):.1f}"],
        ["all blocks", "", f"{blocks}", f"{blocks * sum(whole.values()):.0f}"],
    ]
    table(f"{args.shape}, activations on {args.store} | measured | times | seconds", rows)
    print(
        f"measured on {args.sequences} + {args.validation} sequences of {args.length} tokens; the first "
        f"block took {first['around'] - second['around']:.1f} s longer (compiling)\n"
        f"peak {second['peak']:.2f} GiB of GPU memory beside the activations, {host:.1f} GiB resident on the "
        "host\n"
    )


def print_whole(
    args: argparse.Namespace,
    blocks: int,
    block: dict[str, float],
    evaluation: tuple[float, float],
    layer: float,
    rest: float,
    peak: float,
) -> None:
    micro_steps = E2E_SEQUENCES // args.e2e_batch
    block_ap = blocks * sum(block_seconds(block).values())
    e2e = micro_steps * (blocks * layer + rest) / 1e3
    one, around = evaluation
    evaluations = 4 * (blocks * one + around)
    shape = Linears.of(SHAPES[args.shape])
    rows = [
        ["Block-AP", f"{blocks} blocks", f"{block_ap / 60:.1f}"],
        [
            "E2E-QP",
            f"{micro_steps} x ({blocks} x {layer:.1f} + {rest:.1f}) ms",
            f"{e2e / 60:.1f}",
        ],
        ["perplexity", f"4 x ({blocks} x {one:.2f} + {around:.2f}) s", f"{evaluations / 60:.1f}"],
        ["all", "", f"{(block_ap + e2e + evaluations) / 60:.1f}"],
    ]
    table(f"{args.shape}, whole recipe | calculation | minutes", rows)
    recomputes = "with" if args.recompute == "yes" else "without"
    print(
        f"E2E-QP: {args.e2e_batch} x {args.e2e_length} tokens {recomputes} recomputation, {peak:.1f} GiB "
        f"with {LAYERS} layers; {shape.weights / 1e6:.0f} M weights a block\n"
        "compiling and the export are not in it"
    )


if __name__ == "__main__":
    main()
