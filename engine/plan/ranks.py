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
from engine.plan.estimate import Workload, time_text
from engine.plan.machine import Machine

SHARED = ("sequences", "val_sequences", "batch_size")
"""Fields of a section of which each GPU has a part."""
LINKED = ("H100", "H200", "H20", "B200", "A100", "A800")
"""GPUs that are sold with NVLink between them; others are taken to have PCIe."""
NVLINK, PCIE, LOOPBACK = 150e9, 12e9, 1e9
"""Bytes a second at which tensors are added up. Reckoned, not measured."""


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


def adding_seconds(work: Workload, gpu_name: str, size: float) -> float:
    """Adding up so many bytes over all GPUs: each hands on almost all of them twice."""
    gpus = work.config.runtime.gpus
    linked = any(name in gpu_name for name in LINKED)
    rate = (NVLINK if linked else PCIE) if work.cuda else LOOPBACK
    return 2 * (gpus - 1) / gpus * size / rate


def in_words(config: RunConfig, seconds: float, alone: float) -> str:
    """What several GPUs bring; empty for one."""
    gpus = config.runtime.gpus
    if gpus == 1:
        return ""
    what = "GPUs" if config.runtime.device != "cpu" else "processes"
    return f"{gpus} {what}, each with its share; about {alone / seconds:.1f} times as fast as one"


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
