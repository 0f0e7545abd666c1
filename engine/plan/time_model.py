"""The time model: operations and memory traffic of each phase over the rates of the device.

These are estimates, meant to tell minutes from hours from days; the engine's own progress replaces them
after the first block.
"""

from __future__ import annotations

import math

import msgspec

from engine.architecture.families import Architecture
from engine.config.block_ap import BlockAPConfig
from engine.config.e2e_qp import E2EQPConfig
from engine.plan.estimate import CONSTANTS, GPU_RATES, UNKNOWN_GPU, Constants, Workload

COMPILING_PAYS = 30.0
"""Seconds that compiling has to save; it takes up to half a minute."""


class StepCost(msgspec.Struct, frozen=True):
    """What a Block-AP step takes besides its matrix products; on a GPU either of the two is the floor."""

    per_weight: float = 0.0
    launch: float = 0.0


class PassageCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a forward pass through a block takes besides its matrix products; on a GPU either is the floor."""

    per_number: float = 0.0
    """Of the hidden states."""
    launch: float = 0.0


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine does in a second, and how that is known."""

    flops: float
    plain: StepCost
    compiled: StepCost = StepCost()  # on the CPU nothing is compiled or recorded
    recorded: StepCost = StepCost()
    fast: StepCost = StepCost()
    passage: PassageCost = PassageCost()
    compiled_passage: PassageCost = PassageCost()
    unpack_per_weight: float
    kernel_unpack_per_weight: float
    search_per_weight: float
    basis: str


def speed(cuda: bool, gpu_name: str, cpus: int, avx512: bool, constants: Constants = CONSTANTS) -> Speed:
    """Rates of the device that computes."""
    if cuda:
        key = next((name for name in GPU_RATES if name in gpu_name), None)
        flops, traffic = GPU_RATES[key] if key else UNKNOWN_GPU
        how = {None: "an unknown GPU is taken for", "H200": "measured on an H200:"}.get(
            key, "from the data sheet:"
        )
        return Speed(
            flops=flops,
            plain=StepCost(constants.gpu_step_bytes / traffic, constants.gpu_block_launch),
            compiled=StepCost(constants.gpu_compiled_step_bytes / traffic, constants.gpu_compiled_launch),
            recorded=StepCost(constants.gpu_recorded_step_bytes / traffic, constants.gpu_recorded_launch),
            fast=StepCost(constants.gpu_fast_step_bytes / traffic, constants.gpu_fast_launch),
            passage=PassageCost(
                per_number=constants.gpu_passage_bytes / traffic, launch=constants.gpu_block_launch / 3
            ),
            compiled_passage=PassageCost(
                per_number=constants.gpu_compiled_passage_bytes / traffic,
                launch=constants.gpu_block_launch / 3,
            ),
            unpack_per_weight=constants.gpu_unpack_bytes / traffic,
            kernel_unpack_per_weight=constants.gpu_kernel_unpack_bytes / traffic,
            search_per_weight=constants.gpu_search_bytes / traffic,
            basis=f"{how} {flops / 1e12:.0f} TFLOP/s in matrix products, {traffic / 1e12:.1f} TB/s elsewhere",
        )
    cores = 1 + (max(1, cpus) - 1) * constants.parallel_efficiency
    one = constants.cpu_flops if avx512 else constants.cpu_flops_no_avx512
    slower = constants.cpu_flops / one
    return Speed(
        flops=one * cores,
        plain=StepCost(constants.cpu_step_per_weight * slower / cores),
        unpack_per_weight=constants.cpu_unpack_per_weight * slower / cores,
        kernel_unpack_per_weight=constants.cpu_unpack_per_weight * slower / cores,
        search_per_weight=constants.cpu_search_per_weight * slower / cores,
        basis=f"{one * cores / 1e9:.0f} GFLOP/s in float32 on {cpus} CPU cores, as measured on one core "
        f"{'with' if avx512 else 'scaled down for want of'} AVX-512",
    )


def phase_seconds(
    work: Workload, phase: str, rates: Speed, stored_bytes: int, constants: Constants = CONSTANTS
) -> float:
    """Estimated duration of one phase."""
    arch = work.arch
    load = load_seconds(arch, stored_bytes, constants)
    form = constants.gpu_compile_passage if compiles_passages(work, rates) else 0.0
    if phase == "prepare":
        return constants.prepare
    if phase == "block_ap":
        compiling = 2 * form + (constants.gpu_compile if compiles(work, rates) else 0.0)
        return load + compiling + arch.blocks * _block_seconds(work, rates)
    if phase == "e2e_qp":
        taught = work.config.e2e_qp.loss == "kl" and not work.shares_teacher
        return load + _e2e_seconds(work, rates) + (_teacher_seconds(work, rates) if taught else 0.0)
    if phase == "rtn":
        return load + arch.blocks * _search_seconds(work, rates)
    if phase == "export":
        return load + 3 * arch.blocks * _unpacking(work, rates)
    section = work.config.evaluation
    length = section.sequence_length
    head = work.windows * length * 2 * arch.vocab * arch.hidden / rates.flops
    one = _passing(work, rates, work.windows, length, section.batch_size)
    passing = arch.blocks * one
    # A GPU computes while the next block is read.
    seconds = head + (max(load, passing) + load / arch.blocks if work.cuda else load + passing)
    if phase == "evaluate_fp":
        return seconds + 2 * form
    return seconds + arch.blocks * _unpacking(work, rates) + (form if phase == "evaluate_rtn" else 0.0)


def load_seconds(arch: Architecture, stored_bytes: int, constants: Constants = CONSTANTS) -> float:
    """Reading and converting all blocks once."""
    return arch.blocks * constants.block_load + stored_bytes / constants.read_rate


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of the parts of a training that a kill can undo, or that a restart does again."""

    load: float
    """Reading all blocks once."""
    block: float
    """Block-AP of one block, from one commit to the next."""
    passage: float
    """Of that, reading the block and sending both streams through it."""
    block_step: float
    e2e: float
    """End-to-end training alone."""
    e2e_step: float
    teacher: float
    """The teacher's forward pass through the whole model; 0 without a teacher."""


def pace(work: Workload, rates: Speed, stored_bytes: int, constants: Constants = CONSTANTS) -> Pace:
    """What checkpoints have to keep up with."""
    arch, e2e = work.arch, work.config.e2e_qp
    load = load_seconds(arch, stored_bytes, constants)
    trained = _e2e_seconds(work, rates)
    return Pace(
        load=load,
        block=load / arch.blocks + _block_seconds(work, rates),
        passage=load / arch.blocks + _passage_seconds(work, rates),
        block_step=_block_step_seconds(work, rates),
        e2e=trained,
        e2e_step=trained / (e2e.epochs * math.ceil(e2e.sequences / e2e.batch_size)),
        teacher=load + _teacher_seconds(work, rates) if work.teacher_bytes() else 0.0,
    )


def _forward_flops(arch: Architecture, length: int) -> float:
    """Operations of one block for one token: two a weight, and causal attention over half the sequence."""
    return 2 * arch.linear_params_per_block + 2 * length * arch.heads * arch.head_dim


def _passing(work: Workload, rates: Speed, sequences: int, length: int, batch: int) -> float:
    """So many sequences forward through one block, ``batch`` at a time."""
    cost = rates.compiled_passage if compiles_passages(work, rates) else rates.passage
    tokens = sequences * length
    products = tokens * _forward_flops(work.arch, length) / rates.flops
    return max(
        products + tokens * work.arch.hidden * cost.per_number, math.ceil(sequences / batch) * cost.launch
    )


def _unpacking(work: Workload, rates: Speed) -> float:
    """The weights of one block, once."""
    plain = work.config.runtime.compile == "off"
    one = rates.unpack_per_weight if plain else rates.kernel_unpack_per_weight
    return work.arch.linear_params_per_block * one


def _search_seconds(work: Workload, rates: Speed) -> float:
    """Choosing the initial ranges of a block."""
    grid = work.config.grid
    candidates = 1 if grid.range == "minmax" else 121 if grid.bits == 2 and not grid.symmetric else 21
    return candidates * work.arch.linear_params_per_block * rates.search_per_weight


def compiles(work: Workload, rates: Speed) -> bool:
    """Whether Block-AP's steps are compiled: on a GPU, where all of them together take long enough.

    Deterministic kernels are the plain ones.
    """
    runtime, section = work.config.runtime, work.config.block_ap
    if not work.cuda or not section.enabled or not section.train or runtime.deterministic:
        return False
    if runtime.compile != "auto":
        return runtime.compile == "on"
    steps = section.epochs * math.ceil(section.sequences / section.batch_size) * work.arch.blocks
    saved = _step_seconds(work, rates, compiled=False) - _step_seconds(work, rates, compiled=True)
    return steps * saved >= COMPILING_PAYS


def compiles_e2e(work: Workload, rates: Speed) -> bool:
    """The same of E2E-QP's blocks, judged by the matrix products: what compiling saves is a part of them."""
    runtime, section = work.config.runtime, work.config.e2e_qp
    if not work.cuda or not section.enabled or not section.train or runtime.deterministic:
        return False
    if runtime.compile != "auto":
        return runtime.compile == "on"
    tokens = section.epochs * section.sequences * section.sequence_length
    products = 3 * tokens * work.arch.blocks * _forward_flops(work.arch, section.sequence_length)
    return products / rates.flops >= COMPILING_PAYS


def compiles_passages(work: Workload, rates: Speed) -> bool:
    """The same of forward passes alone: Block-AP's two streams, a teacher's, perplexities. There are five
    forms to compile and more, so it has to save twice as much."""
    runtime = work.config.runtime
    if not work.cuda or runtime.deterministic:
        return False
    if runtime.compile != "auto":
        return runtime.compile == "on"
    evaluations = sum(phase.startswith("evaluate") for phase in work.phases())
    tokens = evaluations * work.windows * work.config.evaluation.sequence_length
    if work.config.block_ap.enabled:
        tokens += 2 * _tokens(work.config.block_ap)
    if work.teacher_bytes() and not work.shares_teacher:
        tokens += _tokens(work.config.e2e_qp)
    saved = rates.passage.per_number - rates.compiled_passage.per_number
    return work.arch.blocks * tokens * work.arch.hidden * saved >= 2 * COMPILING_PAYS


def _tokens(section: BlockAPConfig | E2EQPConfig) -> int:
    return (section.sequences + section.val_sequences) * section.sequence_length


def fast(work: Workload) -> bool:
    """Whether Block-AP takes its steps by one kernel a linear, recorded: on every GPU, where it can.

    Deterministic kernels are the plain ones, and clipping needs the gradients' norm before the step.
    """
    runtime, section = work.config.runtime, work.config.block_ap
    wanted = section.enabled and bool(section.train) and runtime.compile != "off"
    return work.cuda and wanted and not runtime.deterministic and not section.grad_clip


def _block_seconds(work: Workload, rates: Speed) -> float:
    """Block-AP of one block: its steps, a forward pass for validation, 2 to advance streams."""
    section = work.config.block_ap
    length, batch = section.sequence_length, section.batch_size
    steps = section.epochs * math.ceil(section.sequences / batch)
    passes = (section.epochs + 1) * section.val_sequences + 2 * (section.sequences + section.val_sequences)
    one = _step_seconds(work, rates, compiled=compiles(work, rates))
    return steps * one + _passing(work, rates, passes, length, batch) + _search_seconds(work, rates)


def _block_step_seconds(work: Workload, rates: Speed) -> float:
    return _step_seconds(work, rates, compiled=compiles(work, rates))


def _step_seconds(work: Workload, rates: Speed, *, compiled: bool) -> float:
    """One step of Block-AP, 3 forward passes of its batch and what the weights take."""
    section, arch = work.config.block_ap, work.arch
    tokens = section.batch_size * section.sequence_length
    compute = 3 * tokens * _forward_flops(arch, section.sequence_length) / rates.flops
    recorded = fast(work)
    if not compiled and not recorded:
        return compute + arch.linear_params_per_block * rates.plain.per_weight + rates.plain.launch
    cost = (rates.fast if compiled else rates.recorded) if recorded else rates.compiled
    return max(compute + arch.linear_params_per_block * cost.per_weight, cost.launch)


def _passage_seconds(work: Workload, rates: Speed) -> float:
    """Both streams through a finished block: one through its float weights, one through the packed ones."""
    section = work.config.block_ap
    sequences = section.sequences + section.val_sequences
    one = _passing(work, rates, sequences, section.sequence_length, section.batch_size)
    return 2 * one + _unpacking(work, rates)


def _teacher_seconds(work: Workload, rates: Speed) -> float:
    """The text of E2E-QP through the full-precision blocks."""
    section = work.config.e2e_qp
    sequences, batch = section.sequences + section.val_sequences, work.config.block_ap.batch_size
    return work.arch.blocks * _passing(work, rates, sequences, section.sequence_length, batch)


def _e2e_seconds(work: Workload, rates: Speed) -> float:
    """E2E-QP without its teacher's blocks: 3 forward passes a token (4 with recomputation), and the head
    forward and backward."""
    section, arch = work.config.e2e_qp, work.arch
    length = section.sequence_length
    training, validation = section.epochs * section.sequences, (section.epochs + 1) * section.val_sequences
    factor = 4 if work.recomputes else 3
    forward = arch.blocks * _forward_flops(arch, length)
    head = 2 * arch.vocab * arch.hidden
    teacher = head if section.loss == "kl" else 0
    flops = training * length * (factor * forward + 2 * head + teacher)
    flops += validation * length * (forward + head + teacher)
    micro_steps = math.ceil(training / section.micro_batch_size)
    cost = rates.compiled_passage if compiles_e2e(work, rates) else rates.passage
    # A backward pass moves one and a half times what a forward pass does.
    traffic = (factor - 0.5) * training * length * arch.blocks * arch.hidden * cost.per_number
    unpacking = micro_steps * arch.blocks * factor * _unpacking(work, rates)
    launches = micro_steps * arch.blocks * cost.launch * factor
    return max(flops / rates.flops + traffic + unpacking, launches)
