"""What several GPUs of one machine make of a run, beside one of them, in the same call.

    python benchmarks/several_gpus.py                            # 1, 2, 4 GPUs, as many as there are
    python benchmarks/several_gpus.py --gpus 1 4 --what block
    python benchmarks/several_gpus.py --shape tiny --gpus 1 2    # without a GPU: processes on the CPU

The batch stays the same, whatever number of GPUs shares it:

    block   a step of Block-AP, recorded and compiled as in a long run: 8 sequences of 2048 tokens
    add     of that, adding up a block's gradients over the GPUs, by itself
    e2e     a step of E2E-QP on four layers: 32 sequences of 4096 tokens, as many at a time as ``--micro``
    run     both trainings of a whole run of the engine on a model of SmolLM2's shape (random weights and
            text), by the seconds that its phases say they took: streams, validations and commits included

Every number is the median of ``--repeat`` trainings, and their range. A step is timed on the first GPU's own
time line. The last column is how many times as fast as the first row of its kind.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from block_step import GRID, settings
from common import (
    DEVICE,
    SHAPES,
    Marks,
    dtype,
    median_of,
    model,
    packed_block,
    peak_gib,
    random_block,
    reset_peak,
    synchronize,
    table,
    where,
)
from safetensors.torch import save_file
from transformers import LlamaConfig

from engine.config.e2e_qp import E2EQPConfig
from engine.config.loading import load
from engine.data.activations import ActivationStore, make_store
from engine.methods.blockwise.block_ap import train_block
from engine.methods.blockwise.reconstruction import Streams
from engine.methods.network.e2e_qp import train_scales
from engine.methods.network.network import NetworkData
from engine.models.random_weights import RandomReader
from engine.models.source import ModelSource
from engine.quant.packed import Kernels
from engine.ranks.place import LOCAL_HOST, Place, place_of
from engine.run import event_log, events
from engine.run.directory import RunDirectory
from engine.run.launch import ENGINE, python_environment
from engine.training.averaged import Averaged
from engine.training.world import ALONE, World, close_world, meeting_place, open_world

LAYERS = 4
SKIPPED = 2
"""First steps of E2E-QP, in which things are compiled and memory is found."""
WHAT = ("block", "add", "e2e", "run")
UNITS = {"block": "ms a step", "add": "ms", "e2e": "ms a step", "run": "s"}
CUDA = DEVICE.type == "cuda"


def sizes(shape: str) -> dict[str, Any]:
    """Batches and lengths."""
    if shape == "tiny":
        return {"batch": 8, "length": 32, "e2e_batch": 8, "e2e_length": 32, "vocabulary": 256, "steps": 12}
    return {"batch": 8, "length": 2048, "e2e_batch": 32, "e2e_length": 4096, "vocabulary": 32000, "steps": 32}


# -- in each process -----------------------------------------------------------------------------------


def store(sequences: range, length: int, hidden: int, number: int) -> ActivationStore:
    """Normal numbers, of a sequence the same wherever it lies."""
    made = make_store("device", (len(sequences), length, hidden), dtype(), DEVICE)
    for place, sequence in enumerate(sequences):
        generator = torch.Generator(DEVICE).manual_seed(2 * sequence + number)
        made.write(place, torch.randn(1, length, hidden, device=DEVICE, generator=generator).to(dtype()))
    return made


def block(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Steps of Block-AP."""
    how = sizes(args.shape)
    batch, length, sequences = how["batch"], how["length"], how["steps"] * how["batch"]
    lm = model(SHAPES[args.shape])
    stores = [store(world.share(sequences), length, lm.hidden_size, number) for number in (0, 1)]
    streams, took, peak, loss = Streams(stores[0], stores[1], sequences, world), [], 0.0, 0.0
    for number in range(1 + args.repeat):
        marks = Marks()
        reset_peak()
        result = train_block(
            *(lm, 0, copy.deepcopy(random_block(args.shape)).to(DEVICE), streams),
            *(settings(sequences, batch, length), GRID),
            seed=number,
            dtype=dtype(),
            progress=marks,
            keeper=marks,
            world=world,
            fast=CUDA,
            compiles=CUDA,
        )
        if number:  # the first one compiles
            took.append(statistics.median(marks.steps()))
        peak, loss = peak_gib(0), result.final_loss
        del result
        gc.collect()
    return {"took": took, "peak": peak, "loss": loss}


def add(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Gradients of a block, over the ranks."""
    parameters = list(copy.deepcopy(random_block(args.shape)).to(DEVICE, dtype()).parameters())
    averaged = Averaged(world, parameters, DEVICE)
    took = []
    for _ in range(args.repeat):
        begun = time.perf_counter()
        for _ in range(10):
            averaged(parameters, torch.zeros((), device=DEVICE), None)
        synchronize()
        took.append(1e2 * (time.perf_counter() - begun))
    return {"took": took, "bytes": sum(p.nbytes for p in parameters)}


def e2e(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Steps of E2E-QP."""
    how = sizes(args.shape)
    lm = model(SHAPES[args.shape], blocks=LAYERS, vocabulary=how["vocabulary"])
    Kernels.on = False
    if CUDA:
        Kernels.switch_on(DEVICE)
    config = E2EQPConfig(
        sequences=args.steps * how["e2e_batch"],
        val_sequences=0,
        sequence_length=how["e2e_length"],
        batch_size=how["e2e_batch"],
        micro_batch_size=args.micro,
        loss="cross_entropy",
        lr=1e-3,
    )
    generator = torch.Generator().manual_seed(0)
    shape = config.sequences, config.sequence_length
    tokens = torch.randint(0, how["vocabulary"], shape, generator=generator)
    took, peak = [], 0.0
    for number in range(args.repeat):
        blocks = [copy.deepcopy(packed_block(args.shape)) for _ in range(LAYERS)]
        marks = Marks()
        reset_peak()
        train_scales(
            *(lm, blocks, NetworkData(tokens, config.sequences, None, world=world), config),
            seed=number,
            dtype=dtype(),
            progress=marks,
            keeper=marks,
            world=world,
            recompute=args.recompute,
            compiles=CUDA,
            records=CUDA,
        )
        took.append(statistics.median(marks.steps(SKIPPED)))
        peak = peak_gib(0)
        del blocks
        gc.collect()
    return {"took": took, "peak": peak}


def compute(args: argparse.Namespace) -> None:
    """One of the processes; the first prints what was found."""
    place = place_of(args.compute)
    if CUDA:
        torch.cuda.set_device(place.local if place else 0)
    else:
        torch.set_num_threads(1)
    world: World = ALONE
    if place is not None:
        meeting = meeting_place(place.host, place.port, place.size, hosts=place.rank == 0)
        world = open_world(meeting, place.rank, place.size, DEVICE)
    for what in args.what:
        found = {"block": block, "add": add, "e2e": e2e}[what](args, world)
        if world.rank == 0:
            print(json.dumps({"what": what, "gpus": world.size, **found}), flush=True)
    if place is not None:
        world.least([0])  # nobody goes while another still reads
        close_world()


# -- the table -----------------------------------------------------------------------------------------


def measured(args: argparse.Namespace, gpus: int, what: list[str]) -> list[dict[str, Any]]:
    """Of so many processes."""
    port = meeting_place(LOCAL_HOST, 0, 1, hosts=True).port  # which is free again at once
    options = [f"--{name}={getattr(args, name)}" for name in ("shape", "steps", "repeat", "micro")]
    command = [sys.executable, __file__, "--compute", str(gpus), *options, "--what", *what]
    command += ["--recompute"] * args.recompute
    processes = []
    for rank in range(gpus):
        told = Place(rank, gpus, rank, LOCAL_HOST, port).variables()
        output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env={**os.environ, **told}, stdout=output, text=True))
    try:
        said, _ = processes[0].communicate(timeout=args.timeout)
    finally:
        for process in processes:
            process.kill()
    if processes[0].returncode:
        raise SystemExit(f"{what} on {gpus} ended with {processes[0].returncode}")
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def whole_run(args: argparse.Namespace, gpus: int, folder: Path) -> dict[str, Any] | None:
    """Seconds of the trainings of a run, by its own events; none where it was refused or failed, and why."""
    tiny = args.shape == "tiny"
    train, length = (16, 32) if tiny else (args.sequences, 1024)
    took, perplexities, each = [], [], {}
    for number in range(args.repeat if tiny else args.run_repeat):
        overrides: dict[str, object] = {
            "model.source": str(folder / "model"),
            "data.source": str(folder / "text.txt"),
            "evaluation.data.source": str(folder / "text.txt"),
            "evaluation.windows": 8,
            "evaluation.sequence_length": length,
            "grid.bits": 2,
            "grid.group_size": 64,
            "runtime.seed": number,
            "runtime.gpus": gpus,
            "runtime.device": DEVICE.type,
            "export.formats": ["gptq_v2"],
        }
        for section in ("block_ap", "e2e_qp"):
            overrides |= {
                f"{section}.sequences": train,
                f"{section}.val_sequences": 8,
                f"{section}.sequence_length": length,
                f"{section}.batch_size": 8,
                f"{section}.epochs": 2,
            }
        overrides["e2e_qp.micro_batch_size"] = 0
        run = RunDirectory.create(folder / "runs", load("smoke", overrides=overrides))
        ended = subprocess.run(
            [sys.executable, *ENGINE, str(run.path)], env=python_environment(), check=False
        )
        log = event_log.read_events(run.events_path)[0]
        if ended.returncode:
            print(*(e for e in log if isinstance(e, events.Error)), sep="\n", file=sys.stderr, flush=True)
            return None
        for event in log:
            if isinstance(event, events.Warning):
                print(event.message, file=sys.stderr)
        phases = {e.phase: e.seconds for e in log if isinstance(e, events.PhaseFinished)}
        took.append(phases["block_ap"] + phases["e2e_qp"])
        each = {name: round(seconds, 1) for name, seconds in phases.items()}
        perplexities += [e.perplexity for e in log if isinstance(e, events.Eval) and e.stage == "e2e_qp"]
    print(gpus, each, file=sys.stderr, flush=True)
    return {"what": "run", "gpus": gpus, "took": took, "loss": statistics.median(filter(None, perplexities))}


def make_model(shape: str, folder: Path) -> None:
    """Random weights of SmolLM2's shape with a tokenizer, and a text of random words."""
    made = SHAPES["tiny" if shape == "tiny" else "SmolLM2-135M"]
    source = ModelSource.open(load("smoke").model)
    config = LlamaConfig(
        num_hidden_layers=2 if shape == "tiny" else 30,
        vocab_size=source.config.vocab_size if shape == "tiny" else 49152,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **made,
    )
    config.architectures = ["LlamaForCausalLM"]
    (folder / "model").mkdir()
    source.save_assets(folder / "model")
    config.save_pretrained(folder / "model")
    reader = RandomReader(config)
    weights = {name: reader.load(name).to(torch.bfloat16) for name in reader.names()}
    save_file(weights, folder / "model" / "model.safetensors")
    chance = torch.Generator().manual_seed(0)
    words = [
        "the",
        "of",
        "a",
        "run",
        "moves",
        "on",
        "while",
        "others",
        "wait",
        "for",
        "text",
        "that",
        "says",
        "nothing",
        "at",
        "all",
    ]
    picks = torch.randint(0, len(words), (40_000 if shape == "tiny" else 1_500_000,), generator=chance)
    text = " ".join(words[pick] for pick in picks.tolist())
    paragraphs = [text[start : start + 2000] for start in range(0, len(text), 2000)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))


def rows(found: list[dict[str, Any]]) -> list[list[str]]:
    """Of the table."""
    first = {one["what"]: statistics.median(one["took"]) for one in reversed(found)}
    return [
        [
            one["what"],
            str(one["gpus"]),
            f"{median_of(one['took'])} {UNITS[one['what']]}",
            f"{one['peak']:.2f}" if one.get("peak") else "",
            f"{one['loss']:.5g}" if one.get("loss") is not None else "",
            f"{first[one['what']] / statistics.median(one['took']):.2f} x",
        ]
        for one in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", default="Llama-2-7B", choices=list(SHAPES))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--steps", type=int, default=6, help="of E2E-QP")
    parser.add_argument("--micro", type=int, default=4, help="sequences at a time of E2E-QP")
    parser.add_argument("--recompute", action="store_true", help="E2E-QP recomputes activations")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--run-repeat", type=int, default=1, help="of whole runs, each with a seed of its own"
    )
    parser.add_argument("--sequences", type=int, default=512, help="that a whole run is trained on")
    parser.add_argument("--timeout", type=float, default=560.0, help="seconds of one number of GPUs")
    parser.add_argument("--compute", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compute:
        compute(args)
        return
    most = torch.cuda.device_count() if CUDA else os.cpu_count() or 1
    counts = [gpus for gpus in args.gpus if gpus <= most]
    found = []
    steps = [what for what in args.what if what != "run"]
    if steps:
        for gpus in counts:
            found += measured(args, gpus, steps)
            print(*rows(found[-len(steps) :]), sep="\n", file=sys.stderr, flush=True)
    if "run" in args.what:
        with tempfile.TemporaryDirectory() as name:
            make_model(args.shape, Path(name))
            found += filter(None, (whole_run(args, gpus, Path(name)) for gpus in counts))
    ordered = [one for what in WHAT for one in found if one["what"] == what]
    table("what | GPUs | took | peak GiB | loss | as fast", rows(ordered))
    print(f"{args.shape}; {where()}")


if __name__ == "__main__":
    main()
