"""A run on several GPUs, as the plan sees it: what one of them does, whose share of every batch and of all
sequences is as long as a smaller run, and what they have to tell each other.

Stages that one GPU makes while the others wait are planned as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from engine.config.run import RunConfig
from engine.config.stages import STAGES, measured_stage
from engine.plan.estimate import CONSTANTS, Workload, time_text
from engine.plan.link import BYTES_A_SECOND, Link
from engine.plan.machine import Machine
from engine.plan.rates import Speed

SHARED = ("sequences", "val_sequences", "batch_size")
"""Fields of a section of which each GPU has a part."""
MESSAGE_SECONDS = 25e-6
"""Of a message between GPUs, however short. Reckoned, not measured."""
SHARED_WEIGHT_SECONDS = 15e-6
"""Of one matrix more that is shared out, however small: of a step of E2E-QAT on SmolLM2's shape, which has
210 of them, 3.1 and 3.8 ms are left over on two and four H200s."""


def share_of(config: RunConfig) -> RunConfig:
    """What one of the GPUs of a run has to do."""
    gpus = config.runtime.gpus
    if gpus == 1:
        return config
    changed: dict[str, Any] = {}
    for stage in STAGES:
        section = getattr(config, stage.name, None)
        if stage.ranks == "together" and section is not None:
            fields = [name for name in SHARED if name in section.__struct_fields__]
            values = {name: -(-getattr(section, name) // gpus) for name in fields}
            if "micro_batch_size" in section.__struct_fields__:
                values["micro_batch_size"] = min(section.micro_batch_size, values["batch_size"])
            changed[stage.name] = msgspec.structs.replace(section, **values)
    return msgspec.structs.replace(config, **changed)


def shown(config: RunConfig, field: str, value: Any) -> Any:
    """What a GPU's share of a field is, as the field of the run."""
    return value * config.runtime.gpus if field in SHARED else value


def processes(work: Workload, phase: str) -> int:
    """How many compute a phase."""
    together = measured_stage(phase) or (phase in STAGES and STAGES[phase].ranks == "together")
    return work.config.runtime.gpus if together else 1


def adding_seconds(work: Workload, link: Link, size: float) -> float:
    """Adding up so many bytes over all GPUs: each hands on almost all of them twice."""
    gpus = work.config.runtime.gpus
    return 2 * (gpus - 1) / gpus * size / BYTES_A_SECOND[link]


def shared_seconds(work: Workload, rates: Speed, weights: int, groups: int, number: int) -> float:
    """What several GPUs see of a step of ``weights`` that they share out, by recorded steps: gradients of
    ``number`` bytes are added up; the integers, a zero point and a scale a group go to all; beside that the
    norms of gradients, AdamW, and the weights of integers, but for the last portion's
    (:mod:`engine.methods.blockwise.shared_step`)."""
    gpus, bits = work.config.runtime.gpus, work.config.grid.bits
    packed = (2 if bits <= 2 else 4 if bits <= 4 else 8) / 8
    half = work.adding / 2  # of adding up: to whom a part belongs, and back to all
    gradients = half * number * weights
    integers = half * (packed * weights + 5 * groups)
    stepping = (CONSTANTS.gpu_shared_step_bytes + CONSTANTS.gpu_pack_bytes) * rates.per_byte * weights / gpus
    reading = (packed + number) * rates.per_byte * weights
    last = (stepping + reading) / len(work.arch.linears)
    norms = number * rates.per_byte * weights
    each = weights // work.arch.linear_params_per_block * len(work.arch.linears) * SHARED_WEIGHT_SECONDS
    return 3 * MESSAGE_SECONDS + each + last + max(gradients + integers, norms + stepping + reading)


def shared_saves(work: Workload, rates: Speed) -> float:
    """Of the seconds that one GPU takes for the step of a weight, those that :func:`shared_seconds` has."""
    return CONSTANTS.gpu_fast_step_bytes * rates.per_byte if work.adding else 0.0


def in_words(config: RunConfig, link: Link, seconds: float, alone: float) -> str:
    """What several GPUs bring, and over what; empty for one."""
    gpus = config.runtime.gpus
    if gpus == 1:
        return ""
    what = "GPUs" if config.runtime.device != "cpu" else "processes"
    over = f" over {link}" if link else ""
    return f"{gpus} {what}{over}, each with its share; about {alone / seconds:.1f} times as fast as one"


def obstacles(config: RunConfig, machine: Machine, seconds: float, alone: float) -> Iterator[tuple[str, str]]:
    """Why several GPUs are none or of no use here, and what to do."""
    gpus = config.runtime.gpus
    if gpus == 1 or config.runtime.device == "cpu":
        return
    if machine.gpu_name is None:
        yield (
            f"{gpus} GPUs are asked for, and there is none",
            f"--set runtime.device=cpu computes in {gpus} processes",
        )
    elif machine.gpus < gpus:
        yield f"{gpus} GPUs are asked for, and {machine.gpus} can be seen", f"--gpus {machine.gpus}"
    elif seconds > alone:
        yield (
            f"{gpus} GPUs would take {time_text(seconds)}, one of them {time_text(alone)}",
            f"--gpus 1; eqat sweep --jobs {gpus} computes several runs at a time",
        )
