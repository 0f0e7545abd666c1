"""What a checkpoint inside a block costs, and that training continues from it with the same bits.

    python benchmarks/checkpoints.py --device cuda

A block of each shape (random weights, w2g64) is trained on a few random sequences in deterministic mode: once
without checkpoints, once with one in the middle, which is then read back from the disk and continued in
another model. The table says how long training waited for the checkpoint, how long its writing went on beside
training and what steps cost meanwhile, how long reading it back took, and whether the results are equal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from common import SHAPES, Marks, model
from torch import Tensor

from engine.checkpoints.commits import Checkpoints
from engine.checkpoints.snapshots import SnapshotKeeper, snapshot_of
from engine.checkpoints.store import CheckpointStore
from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.config.runtime import RuntimeConfig
from engine.data.activations import make_store
from engine.methods.blockwise.block_ap import train_block
from engine.methods.blockwise.reconstruction import Streams
from engine.models.causal_lm import CausalLM
from engine.process import device_name, package_versions
from engine.quant.packed import PackedBlock
from engine.training.snapshot import Snapshot


class Clock(Marks):
    """The part of a reporter that a training talks to; times every step, and waits for it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.committed = device, []
        self.times: list[float] = []

    def stop_asked(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())

    def go_on(self) -> float:
        return 0.0

    def emit(self, event: Any) -> None:
        self.committed.append((len(self.times), event))


class AtStep(SnapshotKeeper):
    """Takes one checkpoint, at a step of our choice."""

    def __init__(self, checkpoints: Checkpoints, step: int | None) -> None:
        super().__init__(checkpoints, "block_ap", 0)
        self.step = step

    def step_boundary(self, state: Callable[[], Snapshot]) -> None:
        self.report.stop_asked()
        if self.step is not None and len(self.report.times) == self.step:
            self.keep(state())


def train(
    lm: CausalLM, folder: Path, args: argparse.Namespace, step: int | None, resume: bool = False
) -> tuple[PackedBlock, Clock, float]:
    """One training of the block; the result, what the clock saw, and the seconds of reading a checkpoint."""
    device, dtype = lm.device, lm.dtype
    clock = Clock(device)
    store = CheckpointStore(folder, {"what": "benchmark"})
    runtime = RuntimeConfig(checkpoint_minutes=0.0)
    config = BlockAPConfig(
        batch_size=args.batch, sequence_length=args.length, epochs=args.epochs, lr_weight=0.02, lr_quant=0.005
    )
    ids = torch.randint(
        0, 1024, (args.sequences + 2, args.length), generator=torch.Generator().manual_seed(0)
    )
    stores = [make_store("device", (*ids.shape, lm.hidden_size), dtype, device) for _ in range(2)]
    block = lm.load_block(0, dtype=torch.float32)
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for start in range(len(ids)):
            hidden = lm.embed(ids[start : start + 1].to(device))
            stores[1].write(start, hidden)
            stores[0].write(start, lm.run_block(block, 0, hidden))
    began = time.perf_counter()
    snapshot = snapshot_of(store, "block_ap", 0) if resume else None
    reading = time.perf_counter() - began
    keeper = AtStep(Checkpoints(store, clock, runtime), step)  # type: ignore[arg-type]
    result = train_block(
        lm,
        0,
        block,
        Streams(*stores, args.sequences),
        config,
        GridConfig(bits=2, group_size=64),
        seed=0,
        dtype=dtype,
        progress=clock,
        snapshot=snapshot,
        keeper=keeper,
    )
    keeper.finish_writing()
    return result.packed, clock, reading


def row(name: str, device: torch.device, args: argparse.Namespace) -> list[str]:
    """Train three times; a line of the table."""
    lm = model(SHAPES[name], device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        plain, quiet, _ = train(lm, Path(folder) / "none", args, None)
        middle = len(quiet.times) // 2
        place = Path(folder) / "one"
        kept, clock, _ = train(lm, place, args, middle)
        (when, event) = clock.committed[0]
        resumed, _, reading = train(model(SHAPES[name], device), place, args, None, resume=True)
    steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    during = steps[middle : max(middle + 1, when - 1)]
    normal = statistics.median(
        after - before for before, after in zip(quiet.times, quiet.times[1:], strict=False)
    )
    return [
        name,
        f"{event.bytes / 2**30:.2f}",
        f"{event.seconds:.2f}",
        f"{event.background_seconds:.2f}",
        f"{event.seconds / 240:.2%}",
        f"{normal * 1e3:.1f}",
        f"{statistics.median(during) * 1e3:.1f}",
        f"{reading:.2f}",
        str(equal(plain, kept) and equal(plain, resumed)),
    ]


def equal(one: PackedBlock, other: PackedBlock) -> bool:
    first, second = one.tensors(), other.tensors()
    return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.cpu(), other.cpu())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=["SmolLM2-135M"], help=", ".join(SHAPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", help="where the checkpoints are written (default: the temporary folder)")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    device = torch.device(args.device)
    rows = [row(name, device, args) for name in args.shapes]
    header = ["block", "GiB", "wait s", "write s", "of 4 min", "step ms", "meanwhile ms", "read s", "equal"]
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    print(f"\n{device_name(device)}; {versions}; w2g64, {args.batch} x {args.length} tokens, deterministic")
    for line in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
