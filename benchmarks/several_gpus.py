"""What several GPUs of one machine make of a run, beside one of them, in the same call.

    python benchmarks/several_gpus.py --gpus 1 2 4               # as many as there are; four minutes or less
    python benchmarks/several_gpus.py --gpus 1 4 --what block
    python benchmarks/several_gpus.py --shape tiny --gpus 1 2    # without a GPU: processes on the CPU

The batch stays the same, whatever number of GPUs shares it:

    block   a step of Block-AP, recorded and compiled as in a long run: 8 sequences of 2048 tokens
    block2  the same with the published batch of 2, which keeps two GPUs busy
    e2e     a step of E2E-QP on four layers: 16 sequences of 4096 tokens, four at a time
    qat     a step of E2E-QAT on a network of SmolLM2's shape: 32 sequences of 1024 tokens
    70b     a step of E2E-QP on two layers of the 70B shape
    add     adding up a block's gradients over the GPUs, by itself
    run     both trainings of a whole run of the engine on a model of SmolLM2's shape (random weights and
            text), by the seconds that its phases say they took: streams, validations and commits included

The first five unless ``--what`` says otherwise. Every number is the median of ``--repeat`` trainings, and
their range. A step is timed on the first GPU's own time line. Numbers of GPUs that there is room for beside
each other (1 and 2 of 4) are measured at the same time, each on GPUs of its own. The last columns are how
many times as fast as the smallest number of GPUs, and what the plan says to that.

With time left in ``--within``, the largest number measures ``block`` once more without NVLink
(``NCCL_P2P_DISABLE=1``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import DEVICE, SHAPES, median_of, table, where
from safetensors.torch import save_file
from several_steps import CUDA, KINDS, WORDS, kind_of, measure, planned
from transformers import LlamaConfig

from engine.config.loading import load
from engine.models.random_weights import RandomReader
from engine.models.source import ModelSource
from engine.plan.machine import visible_gpus
from engine.process import device_name
from engine.ranks.place import LOCAL_HOST, Place, place_of
from engine.run import event_log, events
from engine.run.directory import RunDirectory
from engine.run.launch import ENGINE, python_environment
from engine.training.world import ALONE, World, close_world, meeting_place, open_world

WITHOUT_NVLINK = {"NCCL_P2P_DISABLE": "1"}
NVLINK_ROW_SECONDS = 45.0
"""Of the row without NVLink, whose steps are compiled already."""

# -- in each process -----------------------------------------------------------------------------------


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
        found: dict[str, Any] = {}
        try:
            found = measure(args, what, world)
        except Exception:
            traceback.print_exc()
        if not all(world.least([bool(found)])):
            found = {"failed": True}
        if world.rank == 0:
            print(json.dumps({"what": what, "gpus": world.size, **found}), flush=True)
        if CUDA:
            torch.cuda.empty_cache()
    if place is not None:
        world.least([0])  # nobody goes while another still reads
        close_world()


# -- the table -----------------------------------------------------------------------------------------


def measured(
    args: argparse.Namespace, gpus: int, what: list[str], first: int = 0, more: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Of so many processes, on the GPUs from number ``first`` on."""
    what = [one for one in what if one == "add" or kind_of(args, one).batch % gpus == 0]
    port = meeting_place(LOCAL_HOST, 0, 1, hosts=True).port  # which is free again at once
    options = [f"--{name}={getattr(args, name)}" for name in ("shape", "repeat")]
    command = [sys.executable, __file__, "--compute", str(gpus), *options, "--what", *what]
    # NVLink's multicast is not everywhere to be had, and a run must not need it.
    environment = {"NCCL_NVLS_ENABLE": "0", **os.environ, **(more or {})}
    if CUDA:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[first : first + gpus])
    processes = []
    for rank in range(gpus):
        told = Place(rank, gpus, rank, LOCAL_HOST, port).variables()
        output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env={**environment, **told}, stdout=output, text=True))
    try:
        said, _ = processes[0].communicate(timeout=args.timeout)
    except subprocess.TimeoutExpired:
        processes[0].kill()
        said, _ = processes[0].communicate()
        print(f"{gpus} GPUs: no more within {args.timeout:.0f} s", file=sys.stderr, flush=True)
    finally:
        for process in processes:
            process.kill()
    found = [json.loads(line) for line in (said or "").splitlines() if line.startswith("{")]
    for one in found:
        if one.get("failed"):
            print(f"{WORDS[one['what']]} on {gpus} failed, as is said above", file=sys.stderr, flush=True)
    return [one for one in found if not one.get("failed")]


def side_by_side(counts: list[int], most: int) -> list[list[tuple[int, int]]]:
    """Which numbers of GPUs are measured at the same time, each with the number of its first one."""
    groups: list[list[tuple[int, int]]] = []
    for gpus in sorted(counts, reverse=True):
        taken = sum(other for other, _ in groups[-1]) if groups else most
        if taken + gpus > most:
            groups.append([])
            taken = 0
        groups[-1].append((gpus, taken))
    return groups


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


def rows(args: argparse.Namespace, found: list[dict[str, Any]]) -> list[list[str]]:
    """Of the table."""
    first = {one["what"]: one for one in reversed(found)}
    made = []
    for one in found:
        what, base = one["what"], first[one["what"]]
        took = statistics.median(one["took"])
        plan = faster = ""
        if what in KINDS:
            kind, name, nvlink = kind_of(args, what), device_name(DEVICE), not one.get("without")
            counts = (one["gpus"], base["gpus"])
            here, alone = (planned(args, kind, gpus, name, nvlink=nvlink) for gpus in counts)
            plan, faster = f"{here.ms:.2f}", f"{alone.ms / here.ms:.2f} x"
        made.append(
            [
                WORDS[what] + one.get("without", ""),
                str(one["gpus"]),
                f"{median_of(one['took'])} {'s' if what == 'run' else 'ms'}",
                f"{one['peak']:.2f}" if one.get("peak") else "",
                f"{one['loss']:.5g}" if one.get("loss") is not None else "",
                f"{statistics.median(base['took']) / took:.2f} x",
                faster,
                plan,
            ]
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", default="Llama-2-7B", choices=list(SHAPES))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--what", nargs="+", choices=list(WORDS), default=list(KINDS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--run-repeat", type=int, default=1, help="of whole runs, each with a seed of its own"
    )
    parser.add_argument("--sequences", type=int, default=512, help="that a whole run is trained on")
    parser.add_argument("--timeout", type=float, default=200.0, help="seconds of one number of GPUs")
    parser.add_argument("--within", type=float, default=240.0, help="seconds of all but whole runs")
    parser.add_argument("--compute", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compute:
        compute(args)
        return
    began = time.monotonic()
    most = torch.cuda.device_count() if CUDA else max(args.gpus)
    counts = sorted({gpus for gpus in args.gpus if gpus <= most})
    found: list[dict[str, Any]] = []
    steps = [what for what in args.what if what != "run"]
    if steps and counts:
        for group in side_by_side(counts, most) if CUDA else [[(gpus, 0)] for gpus in counts]:
            with ThreadPoolExecutor() as pool:
                for one in pool.map(lambda each: measured(args, each[0], steps, each[1]), group):
                    found += one
                    print(*one, sep="\n", file=sys.stderr, flush=True)
    found.sort(key=lambda one: one["gpus"])
    spent = time.monotonic() - began
    if CUDA and "block" in steps and max(counts, default=1) > 1 and spent + NVLINK_ROW_SECONDS < args.within:
        without = measured(args, max(counts), ["block"], more=WITHOUT_NVLINK)
        found += [{**one, "without": ", no NVLink"} for one in without]
    if "run" in args.what:
        with tempfile.TemporaryDirectory() as name:
            make_model(args.shape, Path(name))
            found += filter(None, (whole_run(args, gpus, Path(name)) for gpus in counts))
    ordered = [one for what in WORDS for one in found if one["what"] == what]
    table("what | GPUs | a step | peak GiB | loss | as fast | planned | planned ms", rows(args, ordered))
    print(f"{args.shape}; {where()}")


if __name__ == "__main__":
    main()
