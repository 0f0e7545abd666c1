"""What checkpoints hold, tensor by tensor: the bytes of a finished block, of trained scales, of a snapshot.

The engine writes safetensors files (``engine.checkpoints.tensorfile``): a JSON header, then the tensors. Here
the same header is made from the shapes alone, so the sizes are those of the files, down to models so small
that headers count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from engine.architecture.families import Architecture, LinearShape
from engine.architecture.family_table import FAMILIES, LLAMA
from engine.architecture.headers import ALIGNMENT, ITEM_BITS
from engine.config.grid import Grid, GridConfig
from engine.config.latents import Downcast
from engine.plan.estimate import CONSTANTS, Workload

HIDDEN_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
HEADS = ("model.embed_tokens", "lm_head")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
CPU_GENERATOR, CUDA_GENERATOR = 5056, 16
"""Bytes of torch's generators, whose states a snapshot holds."""


class Tensor(NamedTuple):
    """A tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return ITEM_BITS[self.dtype] // 8

    @property
    def nbytes(self) -> int:
        return self.item_bytes * math.prod(self.shape)


def file_bytes(tensors: Iterable[Tensor]) -> int:
    """Length of the safetensors file of ``tensors``."""
    header, offset = {}, 0
    for tensor in sorted(tensors, key=lambda tensor: (-tensor.item_bytes, tensor.name)):
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    encoded = len(json.dumps(header, separators=(",", ":")))
    return 8 + encoded + -encoded % ALIGNMENT + offset


def norms(arch: Architecture) -> list[tuple[str, int]]:
    """Names and widths of a block's norms; one that stands for all where the family is not known well."""
    widths = {
        "hidden": arch.hidden,
        "head_dim": arch.head_dim,
        "q": arch.heads * arch.head_dim,
        "kv": arch.kv_heads * arch.head_dim,
    }
    kinds = FAMILIES.get(arch.model_type, LLAMA).norms
    outer = [(name, arch.hidden) for name in HIDDEN_NORMS[: kinds.count("hidden")]]
    inner = [widths[kind] for kind in kinds if kind != "hidden"]
    found = [*outer, *zip(HEAD_NORMS, inner, strict=False)]
    exact = sum(width for _, width in found) == arch.norm_params_per_block
    return found if exact else [("norms", arch.norm_params_per_block)]


# ------------------------------------------------------------------------------------- finished work


@lru_cache
def block_bytes(arch: Architecture, grid: GridConfig, latents: Downcast | None = None) -> int:
    """The object of a finished block (``PackedBlock.tensors``), with the ``latents`` that are kept beside
    it."""
    return file_bytes([*_packed(arch, grid), *_others(arch), *_latents(arch, latents)])


def _latents(arch: Architecture, form: Downcast | None) -> Iterator[Tensor]:
    if form is None:
        return
    kind = {"bfloat16": "BF16", "float16": "F16", "fixed": "I8"}[form]
    for linear in arch.linears:
        yield Tensor(f"latent.{linear.name}", kind, (linear.out_features, linear.in_features))


@lru_cache
def head_bytes(arch: Architecture, grid: GridConfig) -> int:
    """The object of a quantized embedding and head; nothing where they stay numbers."""
    if grid.head is None:
        return 0
    named = zip(HEADS, arch.head_matrices, strict=False)
    return file_bytes(
        tensor
        for name, (rows, width) in named
        for tensor in _packed_linear(LinearShape(name, width, rows), grid.head)
    )


def _packed(arch: Architecture, grid: GridConfig) -> Iterator[Tensor]:
    for linear in arch.linears:
        yield from _packed_linear(linear, grid.shared)


def _packed_linear(linear: LinearShape, grid: Grid) -> Iterator[Tensor]:
    grid_shape = (linear.out_features, grid.groups(linear.in_features))
    words = (linear.out_features, linear.in_features * grid.bits // 32)
    yield Tensor(f"linear.{linear.name}.words", "I32", words)
    yield Tensor(f"linear.{linear.name}.scale", "F16", grid_shape)
    yield Tensor(f"linear.{linear.name}.zero_point", "U8", grid_shape)
    yield Tensor(f"linear.{linear.name}.grid", "I32", (3,))


def _norms(arch: Architecture) -> Iterator[Tensor]:
    for name, width in norms(arch):
        yield Tensor(f"other.{name}.weight", "F16", (width,))


def _others(arch: Architecture) -> Iterator[Tensor]:
    yield from _norms(arch)
    for linear in arch.linears:
        if linear.bias:
            yield Tensor(f"other.{linear.name}.bias", "F16", (linear.out_features,))


@lru_cache
def scales_bytes(arch: Architecture, grid: GridConfig, *, norms: bool = False) -> int:
    """The object that a training of the whole network adds for each block: its scales and zero points, and
    the ``norms``, where it trains them."""
    tensors = []
    for linear in arch.linears:
        shape = (linear.out_features, grid.shared.groups(linear.in_features))
        tensors += [
            Tensor(f"{linear.name}.scale", "F16", shape),
            Tensor(f"{linear.name}.zero_point", "U8", shape),
        ]
    return file_bytes([*tensors, *(_norms(arch) if norms else ())])


@lru_cache
def integers_bytes(arch: Architecture, grid: GridConfig, *, norms: bool = False) -> int:
    """The same of a training that changes integers: all that is packed of each linear, but for its grid; and
    the ``norms``, where it trains them."""
    renewed = (tensor for tensor in _packed(arch, grid) if not tensor.name.endswith(".grid"))
    linears = (tensor._replace(name=tensor.name.removeprefix("linear.")) for tensor in renewed)
    return file_bytes([*linears, *(_norms(arch) if norms else ())])


def generation_bytes(arch: Architecture) -> int:
    """A generation file."""
    return CONSTANTS.generation_base + arch.blocks * CONSTANTS.generation_per_block


# ------------------------------------------------------------------------------------------ snapshots


class Factors(NamedTuple):
    """Two factors beside each linear, ``[out, rank]`` and ``[rank, in]``."""

    rank: int
    dtype: str
    """As a file's header calls it."""


def snapshot_bytes(
    work: Workload, train: tuple[str, ...], *, blocks: int, best: bool, factors: Factors | None = None
) -> int:
    """The state of a training in the middle (``Training.state_dict``): for every parameter of ``blocks``
    blocks that is trained its value, AdamW's two moments and, with a ``best`` state, its best value, in the
    parameter's type."""
    return _snapshot_bytes(work.arch, work.config.grid, train, blocks, best, work.cuda, factors)


@lru_cache
def _snapshot_bytes(
    arch: Architecture,
    grid: GridConfig,
    train: tuple[str, ...],
    blocks: int,
    best: bool,
    cuda: bool,
    factors: Factors | None,
) -> int:
    tensors = [Tensor(name, "F32", ()) for name in ("loss", "step.bad", "step.worst", "step.grad_norm")]
    tensors.append(Tensor("random.cpu", "U8", (CPU_GENERATOR,)))
    if cuda:
        tensors.append(Tensor("random.cuda", "U8", (CUDA_GENERATOR,)))
    for index, (dtype, shape) in enumerate(list(_trained(arch, grid, train, factors)) * blocks):
        kept = [f"step.{index}.{name}" for name in ("value", "exp_avg", "exp_avg_sq")]
        kept += [f"best.{index}"] if best else []
        tensors += [Tensor(name, dtype, shape) for name in kept]
        tensors.append(Tensor(f"step.{index}.step", "F32", ()))
    return file_bytes(tensors)


def _trained(
    arch: Architecture, grid: GridConfig, train: tuple[str, ...], factors: Factors | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Types and shapes of what is trained in a block."""
    for linear in arch.linears:
        grid_shape = (linear.out_features, grid.shared.groups(linear.in_features))
        if "weights" in train or "rounding" in train:
            yield "F32", (linear.out_features, linear.in_features)
        if "factors" in train and factors is not None:
            yield factors.dtype, (linear.out_features, factors.rank)
            yield factors.dtype, (factors.rank, linear.in_features)
        if "scales" in train or "clipping" in train:
            yield "F32", grid_shape
        if ("zero_points" in train or "clipping" in train) and not grid.fixes_zero_points:
            yield "F32", grid_shape
    if "norms" in train:
        for _, width in norms(arch):
            yield "F32", (width,)


@lru_cache
def trained_parameters(
    arch: Architecture, grid: GridConfig, train: tuple[str, ...], factors: Factors | None = None
) -> int:
    """Parameters of a block that are trained."""
    return sum(math.prod(shape) for _, shape in _trained(arch, grid, train, factors))
