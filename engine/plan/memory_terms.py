"""What memory consists of: the terms that stages and phases share.

``device`` is what torch's allocator holds on the compute device (``torch.cuda.max_memory_allocated`` on a
GPU), ``host`` the resident memory of the process; on the CPU they are the same memory and are added up.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.architecture.families import Architecture
from engine.config.runtime import StoreKind
from engine.plan.estimate import CONSTANTS, Workload

HEAD_PART = 1 << 22
"""Weights of an embedding or a head that are rounded together: they are larger than any linear."""


class Memory(msgspec.Struct, frozen=True):
    """Peak of a phase, by what takes it; bytes."""

    device: dict[str, int]
    stored: int = 0
    """Activation store in this phase, wherever it is kept."""
    written: int = 0
    """Host memory of a checkpoint being written."""
    aside: int = 0
    """Host memory of a training's first and best state, which a GPU does not keep."""
    processes: int = 1
    """That hold as much, each on a GPU of its own."""

    def gpu(self, store: StoreKind) -> int:
        return sum(self.device.values()) + (self.stored if store == "device" else 0)


def training_memory(work: Workload, parts: dict[str, int], stored: int, written: int, copies: int) -> Memory:
    """A training, with ``copies`` of its first and best state where they lie."""
    if work.cuda:
        return Memory(parts, stored, written, copies)
    return Memory(parts | {"start and best state": copies}, stored, written)


def rounding(work: Workload) -> dict[str, int]:
    """One block while its weights are rounded."""
    return {
        "one block": 4 * work.arch.params_per_block,
        "search for ranges": 4 * largest_linear(work.arch) * CONSTANTS.fake_quant_tensors,
    }


def quantized_head(work: Workload) -> dict[str, int]:
    """The values of a quantized embedding and head, which stand in the place of the original ones while a
    quantized version is measured; those are kept beside them."""
    if work.config.grid.head is None:
        return {}
    return {"quantized embedding and head": work.arch.head_weights * work.model_bytes}


def rounding_head(work: Workload) -> dict[str, int]:
    """Embedding or head, and a part of its rows while their ranges are searched."""
    if work.config.grid.head is None:
        return {}
    most = max(rows * width for rows, width in work.arch.head_matrices)
    search = 4 * min(HEAD_PART, most) * CONSTANTS.fake_quant_tensors
    return {"embedding in float32": 4 * most, "search for ranges of the head": search}


def passing_bytes(arch: Architecture, compute: int, sequences: int, length: int) -> int:
    """Activations of so many sequences that pass forward through one block; ``compute`` bytes a number."""
    taken = compute * sequences * length * (3 * arch.intermediate + 6 * arch.hidden)
    if arch.eager_attention:
        taken += sequences * arch.heads * length**2 * (2 * compute + 4)
    return taken


def largest_linear(arch: Architecture) -> int:
    """Weights of a block's largest linear."""
    return max(linear.weights for linear in arch.linears)


def largest_tensor(arch: Architecture) -> int:
    """Elements of the largest tensor that is loaded."""
    return max(arch.embed_params, arch.head_params, *(linear.weights for linear in arch.linears))


def logits(work: Workload, tokens: int) -> int:
    """Logits that are computed together."""
    most = CONSTANTS.gpu_head_values if work.cuda else CONSTANTS.head_values
    return min(most, tokens * work.arch.vocab)


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


def activation_bytes(work: Workload, batch: int, length: int, compute: int, form: Form) -> int:
    """What one block keeps for the backward pass of a batch."""
    arch = work.arch
    kept = batch * length * activations_per_token(arch, compute, form)
    if arch.eager_attention:
        kept += batch * arch.heads * length * length * (3 * compute + 8)
    return int(kept * (1.0 if work.cuda else CONSTANTS.heap_overhead))
