"""Costs of the phases that belong to no stage's making: preparation, evaluations, the export.

evaluate_*   one block in compute dtype, on a GPU a second one on its way; hidden states of all windows,
             twice where full precision reads them as well; logits of a chunk
export       one block packed and written; then it is read back and compared
"""

from __future__ import annotations

from engine.config.formats import FORMATS
from engine.config.stages import STAGES, Stage, measured_stage
from engine.plan.answers import answer_seconds, held_out_bytes
from engine.plan.costs import costs_of
from engine.plan.estimate import CONSTANTS, Workload
from engine.plan.export_sizes import exported_bytes, number_bytes
from engine.plan.memory_terms import (
    Memory,
    largest_linear,
    largest_tensor,
    logits,
    passing_bytes,
    rounding_head,
)
from engine.plan.own_text import writing_memory
from engine.plan.passages import compiling_form, passing
from engine.plan.portions import passed_together
from engine.plan.rates import Speed, load_seconds, unpacking
from engine.plan.streams import shares_teacher, teacher_bytes

VERIFY_WINDOWS, VERIFY_TOKENS = 2, 512
"""Part of the evaluation text on which the logits of an export and of what was trained are compared."""

TRACE_SECONDS = 1.3
"""To trace a block by torch's exporter, on a slow core; Python's own speed decides."""

# ------------------------------------------------------------------------------------------- preparation


def prepare_memory(work: Workload) -> Memory:
    """Outer tensors are read and checked; a GPU is not where that happens. Then text is written, if the model
    does that."""
    loading = int(largest_tensor(work.arch) * 4 * (CONSTANTS.load_factor - 1))
    rounds, writing = rounding_head(work), writing_memory(work)
    beside = rounds | ({} if work.cuda else {"loading": loading})
    return Memory(max(beside, writing, key=lambda moment: sum(moment.values())))


# -------------------------------------------------------------------------------------------- evaluation


def evaluation_memory(work: Workload, stage: Stage) -> Memory:
    """Measuring ``stage``. A teacher that the training of blocks left is held meanwhile."""
    kept = stage.scope == "block" and shares_teacher(work)
    parts, making = _passing_memory(work), costs_of(stage).while_measured(work)
    if making and work.cuda:  # the next block is made while this one is passed
        parts = parts | {"the next block": sum(making.values())}
    elif making:
        parts = max(parts, making, key=lambda moment: sum(moment.values()))
    streams = 2 if is_compared(work, stage) else 1
    measured = max(streams * work.evaluation_bytes(), held_out_bytes(work))
    return Memory(parts, measured + (teacher_bytes(work) if kept else 0))


def is_compared(work: Workload, stage: Stage) -> bool:
    """Whether the original model reads the texts beside ``stage``."""
    imported = work.config.imported
    known = not imported.enabled or bool(imported.reference)
    return work.config.evaluation.divergence and stage.scope != "nothing" and known


def _passing_memory(work: Workload) -> dict[str, int]:
    section, arch = work.config.evaluation, work.arch
    compute, windows = work.model_bytes, _windows_together(work)
    tokens = windows * section.sequence_length
    # Packed, and unpacked while it is passed; on a GPU the next one is read meanwhile.
    block = compute * arch.params_per_block + arch.linear_params_per_block * work.config.grid.bits // 8
    return {
        "one block": block,
        **({"the next block": compute * arch.params_per_block} if work.cuda else {}),
        "activations or logits": max(
            passing_bytes(arch, compute, windows, section.sequence_length)
            + largest_linear(arch) * CONSTANTS.unpack_bytes,
            logits(work, tokens) * (4 * CONSTANTS.logits_evaluation + (compute if compute < 4 else 0)),
        ),
    }


def _windows_together(work: Workload) -> int:
    section = work.config.evaluation
    return min(passed_together(work, section.batch_size, section.sequence_length), max(1, work.windows))


def evaluation_seconds(work: Workload, stage: Stage, rates: Speed, stored_bytes: int) -> float:
    """All windows through all blocks of ``stage``, and through the head."""
    arch, section = work.arch, work.config.evaluation
    load, length = load_seconds(arch, stored_bytes), section.sequence_length
    head = work.windows * length * 2 * arch.vocab * arch.hidden / rates.flops
    passed = arch.blocks * passing(work, rates, work.windows, length, _windows_together(work))
    # A GPU computes while the next block is read.
    seconds = head + (max(load, passed) + load / arch.blocks if work.cuda else load + passed)
    seconds += answer_seconds(work, rates, stored_bytes)
    form = compiling_form(work, rates)
    if stage.scope == "nothing":
        return seconds + 2 * form
    if is_compared(work, stage):
        seconds *= 2
    return seconds + arch.blocks * unpacking(work, rates) + (form if _is_first_packed(work, stage) else 0.0)


def _is_first_packed(work: Workload, stage: Stage) -> bool:
    """Whether blocks with packed linears pass for the first time, and are compiled for that."""
    measured = (STAGES.get(measured_stage(phase)) for phase in work.phases())
    return stage == next((one for one in measured if one is not None and one.scope != "nothing"), None)


# ------------------------------------------------------------------------------------------------ export


def export_memory(work: Workload) -> Memory:
    """Writing streams tensor by tensor; reading back compares logits on a few hundred tokens, and an engine
    of the export's own loads the whole of it."""
    arch = work.arch
    loaded = max((_loaded_bytes(work, name) for name in work.config.export.formats), default=0)
    parts = {
        "one block": 2 * work.model_bytes * arch.params_per_block,
        "reloaded embeddings and head": work.model_bytes * arch.rest_params,
        "packing": largest_linear(arch) * CONSTANTS.unpack_bytes,
        "logits": VERIFY_WINDOWS * VERIFY_TOKENS * arch.vocab * 4 * 2,
        "one tensor at 16 bits": 2 * largest_tensor(arch),
    }
    if work.cuda:
        return Memory(parts, aside=loaded)
    return Memory(parts | {"the export in its own engine": loaded} if loaded else parts)


def _loaded_bytes(work: Workload, name: str) -> int:
    """Of an export that runs by itself: its files, the packed weights once more as its operators want them,
    and the head in float32, as it is and turned round."""
    if not FORMATS[name].network_bytes:
        return 0
    files = exported_bytes(work.arch, work.config.grid, name, number_bytes(work.config.export.dtype))
    head = work.arch.head_params or work.arch.embed_params
    return 2 * files + 8 * head


def export_seconds(work: Workload, rates: Speed, stored_bytes: int) -> float:
    """Reading everything, three passes over its packed weights, and of formats whose files hold the network
    a trace of it."""
    traced = sum(bool(FORMATS[name].network_bytes) for name in work.config.export.formats)
    passes = 3 * unpacking(work, rates) + TRACE_SECONDS * traced
    return load_seconds(work.arch, stored_bytes) + work.arch.blocks * passes
