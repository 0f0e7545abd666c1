"""What each process of ``several_gpus.py``, and ``methods.py``, measures, and what the plan says of it."""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import torch
from block_step import GRID, settings
from common import (
    DEVICE,
    GIB,
    SHAPES,
    Marks,
    dtype,
    model,
    packed_like,
    peak_gib,
    random_block,
    reset_peak,
    synchronize,
)

from engine.architecture.families import architecture
from engine.config.e2e_qat import E2EQATConfig
from engine.config.e2e_qp import E2EQPConfig
from engine.config.grid import GridConfig
from engine.config.loading import load
from engine.config.lr_qat import LRQATConfig
from engine.config.stages import STAGES
from engine.data.activations import ActivationStore, make_store
from engine.methods.blockwise.block_ap import train_block
from engine.methods.blockwise.reconstruction import Streams
from engine.methods.network.e2e_qat import train_weights
from engine.methods.network.e2e_qp import train_scales
from engine.methods.network.lr_qat import low_rank_linears, train_factors
from engine.methods.network.network import NetworkData
from engine.plan.costs import costs_of
from engine.plan.estimate import Workload
from engine.plan.link import Link, linked_by_name
from engine.plan.ranks import adding_seconds, share_of
from engine.plan.rates import speed
from engine.quant.fake_linear import latent_linears
from engine.quant.low_rank import Kernel
from engine.quant.packed import Kernels
from engine.training.averaged import Averaged
from engine.training.world import World

SKIPPED = 2
"""First steps of a network, in which things are compiled and memory is found."""
CUDA = DEVICE.type == "cuda"


@dataclass(frozen=True)
class Kind:
    """One thing that is measured: a stage, of which shape, with how many ``sequences`` a step."""

    stage: str
    batch: int
    length: int
    steps: int
    """Of a training; as many as are worth it."""
    layers: int = 1
    micro: int = 0
    """Sequences at a time."""
    vocabulary: int = 32000
    shape: str = ""
    """Where it is not the one that is asked for."""
    grid: GridConfig = GRID
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the stage's section that are others than usual."""


KINDS = {
    "block": Kind("block_ap", 8, 2048, 24),
    "block2": Kind("block_ap", 2, 2048, 40),
    "e2e": Kind("e2e_qp", 16, 4096, 5, layers=4, micro=4),
    "qat": Kind("e2e_qat", 32, 1024, 12, layers=30, micro=8, vocabulary=49152, shape="SmolLM2-135M"),
    "70b": Kind("e2e_qp", 16, 4096, 5, layers=2, micro=4, shape="Llama-2-70B"),
}
WORDS = {
    "block": "Block-AP, batch 8",
    "block2": "Block-AP, batch 2",
    "e2e": "E2E-QP",
    "qat": "E2E-QAT, SmolLM2",
    "70b": "E2E-QP, 70B shape",
    "add": "adding up a block's gradients",
    "run": "a run's trainings",
}


def kind_of(args: argparse.Namespace, what: str) -> Kind:
    """As it is measured; of the shape "tiny", everything is."""
    kind = KINDS[what]
    if args.shape != "tiny":
        return kind
    layers = min(kind.layers, 2)
    return Kind(
        kind.stage, min(kind.batch, 8), 32, 6, layers=layers, micro=kind.micro, vocabulary=256, shape="tiny"
    )


def shape_of(args: argparse.Namespace, kind: Kind) -> str:
    """Its name."""
    return kind.shape or str(args.shape)


# -- measured ------------------------------------------------------------------------------------------


def store(sequences: range, length: int, hidden: int, number: int) -> ActivationStore:
    """Normal numbers, of a sequence the same wherever it lies."""
    made = make_store("device", (len(sequences), length, hidden), dtype(), DEVICE)
    for place, sequence in enumerate(sequences):
        generator = torch.Generator(DEVICE).manual_seed(2 * sequence + number)
        made.write(place, torch.randn(1, length, hidden, device=DEVICE, generator=generator).to(dtype()))
    return made


def median_step(marks: Marks, skip: int = 8) -> float:
    """Milliseconds; the first process alone has marks of its own."""
    return statistics.median(marks.steps(skip) or [0.0])


def block(args: argparse.Namespace, kind: Kind, world: World) -> dict[str, Any]:
    """Steps of Block-AP, recorded and compiled as in a long run."""
    shape, sequences = shape_of(args, kind), kind.steps * kind.batch
    lm = model(SHAPES[shape])
    stores = [store(world.share(sequences), kind.length, lm.hidden_size, number) for number in (0, 1)]
    streams, took, peak, loss = Streams(stores[0], stores[1], sequences, world), [], 0.0, 0.0
    for number in range(1 + args.repeat):
        marks = Marks()
        reset_peak()
        result = train_block(
            *(lm, 0, copy.deepcopy(random_block(shape)).to(DEVICE), streams),
            *(settings(sequences, kind.batch, kind.length), GRID),
            seed=number,
            dtype=dtype(),
            progress=marks,
            keeper=marks,
            world=world,
            micro_batch=kind.batch // world.size,
            fast=CUDA,
            compiles=CUDA,
        )
        if number:  # the first one compiles
            took.append(median_step(marks))
        peak, loss = peak_gib(0), result.final_loss
        del result
        gc.collect()
    return {"took": took, "peak": peak, "loss": loss}


def network(args: argparse.Namespace, kind: Kind, world: World) -> dict[str, Any]:
    """Steps of a stage that trains all blocks together."""
    shape, section = shape_of(args, kind), section_of(kind)
    lm = model(SHAPES[shape], blocks=kind.layers, vocabulary=kind.vocabulary)
    Kernels.on = Kernel.on = False
    if CUDA:
        Kernels.switch_on(DEVICE)
        Kernel.switch_on(DEVICE)
    generator = torch.Generator().manual_seed(0)
    count = kind.steps * kind.batch
    data = NetworkData(
        torch.randint(0, kind.vocabulary, (count, kind.length), generator=generator), count, None, world=world
    )
    took, peak, reserved = [], 0.0, 0.0
    for number in range(args.repeat):
        marks = Marks()
        reset_peak()
        options: dict[str, Any] = {
            "seed": number,
            "dtype": dtype(),
            "progress": marks,
            "keeper": marks,
            "world": world,
            "recompute": False,
            "compiles": CUDA,
            "records": CUDA,
        }
        first = copy.deepcopy(random_block(shape)).to(DEVICE, dtype())
        blocks = [first, *(copy.deepcopy(first) for _ in range(kind.layers - 1))]
        quantized = [packed_like(made, lm.linear_names(0), kind.grid.shared) for made in blocks]
        if isinstance(section, E2EQPConfig):
            blocks = [one.install(made) for one, made in zip(quantized, blocks, strict=True)]
            del quantized
            train_scales(lm, blocks, data, section, **options)
        else:
            for place, made in enumerate(blocks):  # of factors, one block's latents at a time
                linears = latent_linears(made, quantized[place], None)
                if isinstance(section, LRQATConfig):
                    low_rank_linears(made, linears, section, number)
                del linears
            del quantized
            if isinstance(section, E2EQATConfig):
                train_weights(lm, blocks, data, section, fast=CUDA, **options)
            else:
                train_factors(lm, blocks, data, section, **options)
        took.append(median_step(marks, SKIPPED))
        peak, reserved = peak_gib(0), torch.cuda.max_memory_reserved() / GIB if CUDA else 0.0
        del blocks
        gc.collect()
    return {"took": took, "peak": peak, "reserved": reserved}


def sections(kind: Kind) -> dict[str, Any]:
    """What sections of networks have in common."""
    return {
        "sequences": kind.steps * kind.batch,
        "val_sequences": 0,
        "sequence_length": kind.length,
        "batch_size": kind.batch,
        "micro_batch_size": kind.micro,
        "epochs": 1,
        "loss": "cross_entropy",
    }


def section_of(kind: Kind) -> E2EQPConfig | E2EQATConfig | LRQATConfig:
    """Of a stage that trains all blocks together."""
    fields = {**sections(kind), **dict(kind.changes)}
    if kind.stage == "e2e_qp":
        return E2EQPConfig(**fields, lr=1e-3)
    if kind.stage == "e2e_qat":
        return E2EQATConfig(**fields, enabled=True, lr_weight=1e-3, lr_quant=1e-4)
    return LRQATConfig(**fields, enabled=True, text_weight=0.0).resolved(kind.grid)


def add(args: argparse.Namespace, kind: Kind, world: World) -> dict[str, Any]:
    """Gradients of a block, over the ranks, by themselves."""
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


def measure(args: argparse.Namespace, what: str, world: World) -> dict[str, Any]:
    """One of the kinds, by one of the processes."""
    if what == "add":
        return add(args, KINDS["block"], world)
    kind = kind_of(args, what)
    work: Callable[..., dict[str, Any]] = block if kind.stage == "block_ap" else network
    return work(args, kind, world)


# -- planned -------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """As the plan reckons it."""

    ms: float
    """Of a step."""
    gib: float
    """Of a stage that trains all blocks together, with the embeddings and the head."""


def planned(
    args: argparse.Namespace, kind: Kind, gpus: int, gpu_name: str, *, nvlink: bool = True
) -> Planned:
    """What a step of ``kind`` takes; without ``nvlink``, as if it were switched off."""
    fields = {"num_hidden_layers": kind.layers, "vocab_size": kind.vocabulary, **SHAPES[shape_of(args, kind)]}
    arch = architecture({"model_type": "llama", "torch_dtype": "bfloat16", **fields})
    section: Any
    if kind.stage == "block_ap":
        section = settings(kind.steps * kind.batch, kind.batch, kind.length)
    else:
        section = section_of(kind)
    config = load("smoke")
    runtime = msgspec.structs.replace(config.runtime, gpus=gpus, compile="on")
    config = msgspec.structs.replace(config, runtime=runtime, grid=kind.grid, **{kind.stage: section})
    share = share_of(config)
    work = Workload(arch=arch, config=share, cuda=CUDA, windows=0, short_of_memory=False, whole=config)
    if gpus > 1:
        linked: Link = "NVLink" if nvlink and linked_by_name(gpu_name) else "PCIe"
        work = msgspec.structs.replace(work, adding=adding_seconds(work, linked if CUDA else "", 1.0))
    rates, costs = speed(CUDA, gpu_name, 1, True), costs_of(STAGES[kind.stage])
    work = msgspec.structs.replace(work, compiled=frozenset({kind.stage}) if CUDA else frozenset())
    if kind.stage == "block_ap":
        seconds, memory = costs.step_seconds(work, rates), 0  # type: ignore[attr-defined]
    else:
        seconds = costs.training_seconds(work, rates) / kind.steps  # type: ignore[attr-defined]
        memory = sum(costs.network_memory(work).values())  # type: ignore[attr-defined]
        memory += arch.rest_params * work.model_bytes
    step = seconds + costs.adding_seconds(work, rates)  # type: ignore[attr-defined]
    return Planned(float(1e3 * step), memory / GIB)
