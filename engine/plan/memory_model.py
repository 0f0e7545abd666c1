"""The memory model: what each phase of a run holds at its peak.

It follows the engine phase by phase. ``device`` is what torch's allocator holds on the compute device
(``torch.cuda.max_memory_allocated`` on a GPU), ``host`` the resident memory of the process; on the CPU
they are the same memory and are added up.

    every phase      embeddings, head, final norm in compute dtype
    block_ap         of one block: float32 weights, AdamW moments, on the CPU the copies of the start and of
                     the best state (a GPU keeps them on the host); plus the larger of (activations of a
                     batch + fake-quantized weights) at the top of the backward pass and (float32 gradients)
                     at its bottom
    e2e_qp           packed integers of all blocks; scales with gradient, moments and copies; the input of
                     every block (or all activations), one block's activations, logits of a chunk of tokens
    evaluate_*       one block in compute dtype, on a GPU a second one on its way; hidden states of all
                     windows, logits of a chunk
    activation store two streams of sequences x length x hidden in block_ap, one (the teacher's) in e2e_qp
    checkpoint       host memory: the copy of a training's state that a thread writes while training goes on
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.architecture.families import Architecture
from engine.plan.checkpoint_sizes import snapshot_bytes
from engine.plan.estimate import CONSTANTS, Constants, Store, Workload


class Memory(msgspec.Struct, frozen=True):
    """Peak of a phase, by what takes it; bytes."""

    device: dict[str, int]
    stored: int = 0
    """Activation store in this phase, wherever it is kept."""
    written: int = 0
    """Host memory of a checkpoint being written."""
    aside: int = 0
    """Host memory of a training's first and best state, which a GPU does not keep."""

    def gpu(self, store: Store) -> int:
        return sum(self.device.values()) + (self.stored if store == "device" else 0)


def host_memory(work: Workload, memory: Memory, store: Store, constants: Constants = CONSTANTS) -> int:
    """Resident memory of the process in a phase."""
    stored = self_held(work, memory, store) + memory.written + memory.aside
    if not work.cuda:
        return constants.base_cpu + constants.math_workspace + sum(memory.device.values()) + stored
    loading = int(max(largest_tensor(work.arch), work.arch.params_per_block) * 4 * constants.load_factor)
    return constants.base_cuda_host + loading + stored


def self_held(work: Workload, memory: Memory, store: Store) -> int:
    """Host bytes of the activation store."""
    return memory.stored if store == "host" or (store == "device" and not work.cuda) else 0


def largest_tensor(arch: Architecture) -> int:
    """Elements of the largest tensor that is loaded."""
    return max(arch.embed_params, arch.head_params, *(linear.weights for linear in arch.linears))


def phase_memory(work: Workload, phase: str, constants: Constants = CONSTANTS) -> Memory:
    """Peak of one phase."""
    outer = {"embeddings and head": work.arch.rest_params * work.model_bytes}
    if phase == "prepare":
        loading = int(largest_tensor(work.arch) * 4 * (constants.load_factor - 1))
        return Memory(outer | ({} if work.cuda else {"loading": loading}))
    if phase == "block_ap":
        copies = 4 * trained_parameters(work) * (2 if work.config.block_ap.val_sequences else 1)
        return _training_memory(
            work,
            outer | _block_ap(work, constants),
            2 * work.stream_bytes(),
            snapshot_bytes(work, phase),
            copies,
        )
    if phase == "e2e_qp":
        copies = 4 * _trained_scales(work) * (2 if work.config.e2e_qp.val_sequences else 1)
        return _training_memory(
            work, outer | _e2e_qp(work, constants), work.teacher_bytes(), snapshot_bytes(work, phase), copies
        )
    if phase == "rtn":
        return Memory(outer | _rounding(work, constants))
    if phase == "export":
        return Memory(outer | _export(work, constants))
    kept = phase in ("evaluate_rtn", "evaluate_block_ap") and work.shares_teacher
    teacher = work.teacher_bytes() if kept else 0
    parts = _evaluate(work, constants)
    if phase == "evaluate_rtn":
        rounding = _rounding(work, constants)
        # A GPU rounds the next block while this one is passed.
        parts = (
            parts | {"the next block": sum(rounding.values())} if work.cuda else _merge_peak(parts, rounding)
        )
    return Memory(outer | parts, work.evaluation_bytes() + teacher)


def _training_memory(work: Workload, parts: dict[str, int], stored: int, written: int, copies: int) -> Memory:
    """A training, with ``copies`` of its first and best state where they lie."""
    if work.cuda:
        return Memory(parts, stored, written, copies)
    return Memory(parts | {"start and best state": copies}, stored, written)


def _merge_peak(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """The larger of two moments of a phase."""
    return max(one, other, key=lambda parts: sum(parts.values()))


Form = Literal["plain", "master", "compiled"]


def activations_per_token(arch: Architecture, compute: int, form: Form) -> int:
    """Bytes that one block keeps for its backward pass, for each token (Llama's forward, line by line).

    ``compute`` bytes a number. ``master``: weights are float32, so at 16 bits autocast makes every linear
    its own copy of its input, and norms work on a float32 copy. ``compiled``: norms and the MLP's activation
    are computed again from what is kept anyway (2.12 GiB for 16384 tokens of a 7B block on an H200).
    """
    hidden, q, kv = arch.hidden, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    inner = arch.intermediate
    if form == "compiled":
        return compute * (5 * hidden + 2 * q + 2 * kv + 3 * inner)
    wide = 4 * hidden if compute < 4 else 0
    copies = (3, 2) if form == "master" and compute < 4 else (1, 1)
    norms = 2 * (wide + compute * hidden)
    attention = compute * (copies[0] * hidden + 2 * q + 2 * kv)
    residual = compute * hidden
    mlp = compute * (copies[1] * hidden + 4 * inner)
    return norms + attention + residual + mlp


def activation_bytes(
    work: Workload, batch: int, length: int, compute: int, form: Form, constants: Constants
) -> int:
    """What one block keeps for the backward pass of a batch."""
    arch = work.arch
    kept = batch * length * activations_per_token(arch, compute, form)
    if arch.eager_attention:
        kept += batch * arch.heads * length * length * (3 * compute + 8)
    return int(kept * (1.0 if work.cuda else constants.heap_overhead))


def trained_parameters(work: Workload) -> int:
    """Parameters of a block that Block-AP trains."""
    arch, grid, train = work.arch, work.config.grid, work.config.block_ap.train
    groups = arch.groups_per_block(grid.group_size)
    counts = {
        "weights": arch.linear_params_per_block,
        "norms": arch.norm_params_per_block,
        "scales": groups,
        "zero_points": 0 if grid.symmetric else groups,
    }
    return sum(counts[name] for name in train)


def _block_ap(work: Workload, constants: Constants) -> dict[str, int]:
    section, arch = work.config.block_ap, work.arch
    compute = work.bytes_of(section.compute_dtype)
    tokens = section.batch_size * section.sequence_length
    trained = trained_parameters(work)
    largest = max(linear.weights for linear in arch.linears)
    top_of_backward = (
        activation_bytes(work, section.batch_size, section.sequence_length, compute, "master", constants)
        + compute * tokens * (3 * arch.hidden + 3 * arch.intermediate)  # batch, target, output; gradients
        + 4 * tokens * arch.hidden * constants.loss_tensors
        + compute * arch.linear_params_per_block
    )
    weights = arch.params_per_block + 3 * arch.groups_per_block(work.config.grid.group_size)
    return {
        "weights of a block": 4 * weights,
        "optimizer": 8 * trained,
        "activations and gradients": max(top_of_backward, 4 * trained),
        "fake quantization": 4 * largest * constants.fake_quant_tensors,
    }


def _trained_scales(work: Workload) -> int:
    """Scales and zero points that E2E-QP trains."""
    section, grid = work.config.e2e_qp, work.config.grid
    kinds = sum(1 for kind in section.train if kind == "scales" or not grid.symmetric)
    return kinds * work.arch.blocks * work.arch.groups_per_block(grid.group_size)


def _logits(work: Workload, tokens: int, constants: Constants) -> int:
    """Computed together."""
    most = constants.gpu_head_values if work.cuda else constants.head_values
    return min(most, tokens * work.arch.vocab)


def _e2e_qp(work: Workload, constants: Constants) -> dict[str, int]:
    section, arch, grid = work.config.e2e_qp, work.arch, work.config.grid
    compute = work.bytes_of(section.compute_dtype)
    tokens = section.micro_batch_size * section.sequence_length
    scales = arch.blocks * arch.groups_per_block(grid.group_size)
    form: Form = "compiled" if work.compiles_e2e else "plain"
    block = activation_bytes(
        work, section.micro_batch_size, section.sequence_length, compute, form, constants
    )
    inputs = arch.blocks * tokens * arch.hidden * compute
    chunk = _logits(work, tokens, constants)
    tensors = constants.logits_kl if section.loss == "kl" else constants.logits_cross_entropy
    logits = chunk * (4 * tensors + (compute if compute < 4 else 0))
    # On a GPU, what is kept of a block is there once; the CPU's heap keeps the room beside it.
    again = block if work.recomputes or not work.cuda else 0
    backward = again + compute * tokens * 3 * arch.intermediate
    kept = inputs if work.recomputes else arch.blocks * block
    # A batch of the teacher's hidden states, and the next one on its way.
    teacher = 2 * tokens * arch.hidden * compute if section.loss == "kl" and work.cuda else 0
    largest = max(linear.weights for linear in arch.linears)
    return {
        "packed blocks": arch.blocks * (arch.linear_params_per_block * grid.bits // 8)
        + scales
        + arch.blocks * (arch.norm_params_per_block + arch.bias_params_per_block) * work.model_bytes,
        "scales and optimizer": 4 * scales + (4 + 8) * _trained_scales(work),
        "activations": kept + 3 * tokens * arch.hidden * compute + teacher,
        **_head_and_backward(work, logits, backward + largest * constants.unpack_bytes, constants),
    }


def _head_and_backward(work: Workload, logits: int, backward: int, constants: Constants) -> dict[str, int]:
    """The head's and the blocks' backward passes take turns: a GPU's allocator reuses the memory, the CPU's
    heap keeps what blocks used while the logits, too large for it, are mapped beside it."""
    if work.cuda:
        return {"logits or one block's backward": max(logits, backward)}
    section, arch = work.config.e2e_qp, work.arch
    tokens = section.micro_batch_size * section.sequence_length
    widest = 4 * tokens * arch.intermediate
    holes = 0
    if work.recomputes and widest < constants.mmap_threshold:
        per_block = widest + 2 * 4 * tokens * arch.hidden
        holes = int(constants.checkpoint_holes * arch.blocks * per_block)
    return {"logits": logits, "one block's backward": backward, "holes in the heap": holes}


def _evaluate(work: Workload, constants: Constants) -> dict[str, int]:
    section, arch = work.config.evaluation, work.arch
    compute = work.model_bytes
    tokens = section.batch_size * section.sequence_length
    logits = _logits(work, tokens, constants)
    largest = max(linear.weights for linear in arch.linears)
    passing = compute * tokens * (3 * arch.intermediate + 6 * arch.hidden)
    if arch.eager_attention:
        passing += section.batch_size * arch.heads * section.sequence_length**2 * (2 * compute + 4)
    # Packed, and unpacked while it is passed; on a GPU the next one is read meanwhile.
    block = compute * arch.params_per_block + arch.linear_params_per_block * work.config.grid.bits // 8
    return {
        "one block": block,
        **({"the next block": compute * arch.params_per_block} if work.cuda else {}),
        "activations or logits": max(
            passing + largest * constants.unpack_bytes,
            logits * (4 * constants.logits_evaluation + (compute if compute < 4 else 0)),
        ),
    }


def _rounding(work: Workload, constants: Constants) -> dict[str, int]:
    arch = work.arch
    largest = max(linear.weights for linear in arch.linears)
    return {
        "one block": 4 * arch.params_per_block,
        "search for ranges": 4 * largest * constants.fake_quant_tensors,
    }


def _export(work: Workload, constants: Constants) -> dict[str, int]:
    """Writing streams tensor by tensor; reading back compares logits on a few hundred tokens."""
    arch = work.arch
    largest = max(linear.weights for linear in arch.linears)
    logits = 2 * 512 * arch.vocab * 4 * 2
    return {
        "one block": 2 * work.model_bytes * arch.params_per_block,
        "reloaded embeddings and head": work.model_bytes * arch.rest_params,
        "packing": largest * constants.unpack_bytes,
        "logits": logits,
        "one tensor at 16 bits": 2 * largest_tensor(arch),
    }
