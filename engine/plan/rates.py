"""How fast a machine is, and what all phases are made of: reading, unpacking, searching for ranges."""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.architecture.families import Architecture
from engine.config.grid import Grid
from engine.config.range_steps import tried_ranges
from engine.plan.estimate import CONSTANTS, GPU_RATES, UNKNOWN_GPU, Workload

COMPILING_PAYS = 30.0
"""Seconds that compiling a block's training has to save; it takes up to half a minute."""
COMPILING_NETWORK_PAYS = 12.0
"""The same for the blocks of a network that is trained as a whole: forward and backward of one block."""


class StepCost(msgspec.Struct, frozen=True):
    """What a step of a block's training takes besides its matrix products; on a GPU either is the floor."""

    per_weight: float = 0.0
    launch: float = 0.0
    per_number: float = 0.0
    """Of the hidden states; where it is 0, that is part of ``per_weight``."""


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
    search_error: float
    """One weight with one pair of scale and zero point, where both are searched together."""
    kernel_search_error: float
    per_byte: float = 0.0
    """Of a GPU's memory, by kernels of ours."""
    drop_per_number: float
    """Of a block's output, to leave out of its loss what is furthest off."""
    writing_launch: float = 0.0
    generating_launch: float = 0.0
    """Of a block, for a token: by recorded steps, and where attention keeps its scores, by others."""
    writing_per_byte: float = 0.0
    """Of keys and values, for every token of a text that is written."""
    basis: str


def speed(cuda: bool, gpu_name: str, cpus: int, avx512: bool) -> Speed:
    """Rates of the device that computes."""
    if cuda:
        key = next((name for name in GPU_RATES if name in gpu_name), None)
        flops, traffic = GPU_RATES[key] if key else UNKNOWN_GPU
        how = {None: "an unknown GPU is taken for", "H200": "measured on an H200:"}.get(
            key, "from the data sheet:"
        )
        return Speed(
            flops=flops,
            plain=StepCost(CONSTANTS.gpu_step_bytes / traffic, CONSTANTS.gpu_block_launch),
            compiled=StepCost(CONSTANTS.gpu_compiled_step_bytes / traffic, CONSTANTS.gpu_compiled_launch),
            recorded=StepCost(CONSTANTS.gpu_recorded_step_bytes / traffic, CONSTANTS.gpu_recorded_launch),
            fast=StepCost(
                CONSTANTS.gpu_fast_step_bytes / traffic,
                CONSTANTS.gpu_fast_launch,
                CONSTANTS.gpu_fast_number_bytes / traffic,
            ),
            per_byte=1 / traffic,
            passage=PassageCost(
                per_number=CONSTANTS.gpu_passage_bytes / traffic, launch=CONSTANTS.gpu_block_launch / 3
            ),
            compiled_passage=PassageCost(
                per_number=CONSTANTS.gpu_compiled_passage_bytes / traffic,
                launch=CONSTANTS.gpu_block_launch / 3,
            ),
            unpack_per_weight=CONSTANTS.gpu_unpack_bytes / traffic,
            kernel_unpack_per_weight=CONSTANTS.gpu_kernel_unpack_bytes / traffic,
            search_per_weight=CONSTANTS.gpu_search_bytes / traffic,
            search_error=CONSTANTS.gpu_search_error_bytes / traffic,
            kernel_search_error=CONSTANTS.gpu_kernel_search_error,
            drop_per_number=CONSTANTS.gpu_drop_bytes / traffic,
            writing_launch=CONSTANTS.gpu_writing_launch,
            generating_launch=CONSTANTS.gpu_generating_launch,
            writing_per_byte=CONSTANTS.gpu_writing_traffic / traffic,
            basis=f"{how} {flops / 1e12:.0f} TFLOP/s in matrix products, {traffic / 1e12:.1f} TB/s elsewhere",
        )
    cores = 1 + (max(1, cpus) - 1) * CONSTANTS.parallel_efficiency
    one = CONSTANTS.cpu_flops if avx512 else CONSTANTS.cpu_flops_no_avx512
    slower = CONSTANTS.cpu_flops / one
    return Speed(
        flops=one * cores,
        plain=StepCost(CONSTANTS.cpu_step_per_weight * slower / cores),
        unpack_per_weight=CONSTANTS.cpu_unpack_per_weight * slower / cores,
        kernel_unpack_per_weight=CONSTANTS.cpu_unpack_per_weight * slower / cores,
        search_per_weight=CONSTANTS.cpu_search_per_weight * slower / cores,
        search_error=CONSTANTS.cpu_search_error * slower / cores,
        kernel_search_error=CONSTANTS.cpu_search_error * slower / cores,
        drop_per_number=CONSTANTS.cpu_drop_per_number,
        basis=f"{one * cores / 1e9:.0f} GFLOP/s in float32 on {cpus} CPU cores, as measured on one core "
        f"{'with' if avx512 else 'scaled down for want of'} AVX-512",
    )


def load_seconds(arch: Architecture, stored_bytes: int) -> float:
    """Reading and converting all blocks once."""
    return arch.blocks * CONSTANTS.block_load + stored_bytes / CONSTANTS.read_rate


def forward_flops(arch: Architecture, length: int) -> float:
    """Operations of one block for one token: two a weight, and causal attention over half the sequence."""
    return 2 * arch.linear_params_per_block + 2 * length * arch.heads * arch.head_dim


def unpacking(work: Workload, rates: Speed) -> float:
    """The weights of one block, once."""
    plain = work.config.runtime.compile == "off"
    one = rates.unpack_per_weight if plain else rates.kernel_unpack_per_weight
    return work.arch.linear_params_per_block * one


def search_seconds(work: Workload, rates: Speed) -> float:
    """Choosing the initial ranges of a block."""
    grid = work.config.grid
    return _tried(grid.range, grid.shared) * work.arch.linear_params_per_block * rates.search_per_weight


def head_seconds(work: Workload, rates: Speed) -> float:
    """Rounding embedding and head, where they are quantized: once a run."""
    grid = work.config.grid
    if grid.head is None:
        return 0.0
    return _tried(grid.range, grid.head) * work.arch.head_weights * rates.search_per_weight


def _tried(method: Literal["minmax", "search"], grid: Grid) -> int:
    """Ranges that are tried for each group."""
    return 1 if method == "minmax" else tried_ranges(grid)
