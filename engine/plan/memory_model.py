"""The memory model: what each phase of a run holds at its peak.

Embeddings, head and final norm are there in every phase. What a stage holds beside them while it is made is
said in its file (:mod:`engine.plan.stages`); what the other phases hold, in ``phases.py``.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

import msgspec

from engine.config.runtime import StoreKind
from engine.config.stages import STAGES, measured_stage
from engine.plan.costs import costs_of
from engine.plan.estimate import CONSTANTS, Workload
from engine.plan.memory_terms import Memory, largest_tensor, quantized_head
from engine.plan.phases import evaluation_memory, export_memory, prepare_memory
from engine.plan.ranks import processes


def phase_memory(work: Workload, phase: str) -> Memory:
    """Peak of one phase."""
    memory = _beside_the_outer_tensors(work, phase)
    outer = {"embeddings and head": work.arch.rest_params * work.model_bytes}
    measured = measured_stage(phase)
    if phase == "export" or (measured and STAGES[measured].scope != "nothing"):
        outer |= quantized_head(work)
    return msgspec.structs.replace(memory, device=outer | memory.device, processes=processes(work, phase))


def _beside_the_outer_tensors(work: Workload, phase: str) -> Memory:
    if phase in STAGES:
        return costs_of(STAGES[phase]).memory(work)
    if measured_stage(phase):
        return evaluation_memory(work, STAGES[measured_stage(phase)])
    return {"prepare": prepare_memory, "export": export_memory}[phase](work)


def host_memory(work: Workload, memory: Memory, store: StoreKind) -> int:
    """Resident memory of the process in a phase; of all of them, where there are several, of which the first
    alone writes checkpoints."""
    idle = CONSTANTS.base_cuda_host if work.cuda else imported_bytes()
    waiting = work.config.runtime.gpus - memory.processes
    return memory.processes * _of_process(work, memory, store) + memory.written + waiting * idle


@functools.cache
def imported_bytes() -> int:
    """What an engine on the CPU takes once it has imported its libraries, none of which is imported here."""
    torch = find_spec("torch")
    build = None if torch is None or torch.origin is None else Path(torch.origin).parent / "lib"
    gpus = build is not None and any(build.glob("*torch_cuda.*"))
    return CONSTANTS.base_cuda_build if gpus else CONSTANTS.base_cpu


def _of_process(work: Workload, memory: Memory, store: StoreKind) -> int:
    stored = self_held(work, memory, store) + memory.aside
    if not work.cuda:
        return imported_bytes() + CONSTANTS.math_workspace + sum(memory.device.values()) + stored
    loading = int(max(largest_tensor(work.arch), work.arch.params_per_block) * 4 * CONSTANTS.load_factor)
    return CONSTANTS.base_cuda_host + loading + stored


def self_held(work: Workload, memory: Memory, store: StoreKind) -> int:
    """Host bytes of the activation store."""
    return memory.stored if store == "host" or (store == "device" and not work.cuda) else 0
