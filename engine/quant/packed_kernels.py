"""Packed integers to 16-bit weights, and gradients of scales, on a GPU (Triton).

Both walk through a matrix once. The plain forms in :mod:`engine.quant.packed` need a dozen passes over it:
they spread every word over its values, mask, convert, subtract and multiply one operation at a time.

    dequantize        reads bits/8 bytes a weight, writes 2
    group_gradients   reads 2 bytes (the weight's gradient) and bits/8 a weight, writes two numbers a group:
                      sum of q dW^ and sum of dW^, of which  ds = sum q dW^ - z sum dW^,  dz = -s sum dW^

Rows fill whole words, so a matrix is one stream of bits: value ``n`` begins at bit ``bits * n``, wherever
rows begin and end, and belongs to group ``n / group_size``.

They are registered as operators of torch, opaque to its compiler.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 4096
"""Weights of a program of ``dequantize``."""
HELD_VALUES = 2048
LARGEST_HELD_GROUP = 512


@torch.library.custom_op("eqat::dequantize", mutates_args=())
def dequantize(
    words: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    bits: int,
    dtype: torch.dtype,
    after: Tensor | None = None,
) -> Tensor:
    """``(q - z) s``, computed in float32 and rounded to ``dtype`` once, ``[O, I]``; whole zero points of any
    dtype.

    ``after`` is not read. A backward pass names the gradient it has got: else the compiler would see two
    equal computations, do one and keep the weight from the forward pass on.
    """
    weight = torch.empty(words.shape[0], words.shape[1] * 32 // bits, dtype=dtype, device=words.device)
    count = weight.numel()
    group = count // scale_OG.numel()
    tensors = words, scale_OG.contiguous(), zero_OG.contiguous(), weight
    launcher: Any
    if 32 % bits == 0 and group % (32 // bits) == 0:
        at_once = VALUES * bits // 32
        launcher = _dequantize_words[(triton.cdiv(words.numel(), at_once),)]
        launcher(*tensors, words.numel(), GROUP=group, BITS=bits, WORDS=at_once)
    else:
        launcher = _dequantize[(triton.cdiv(count, VALUES),)]
        launcher(*tensors, count, GROUP=group, BITS=bits, VALUES=VALUES)
    return weight


@dequantize.register_fake
def _(
    words: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    bits: int,
    dtype: torch.dtype,
    after: Tensor | None = None,
) -> Tensor:
    return words.new_empty((words.shape[0], words.shape[1] * 32 // bits), dtype=dtype)


@torch.library.custom_op("eqat::group_gradients", mutates_args=())
def group_gradients(gradient_OI: Tensor, words: Tensor, groups: int, bits: int) -> Tensor:
    """Sums over each group of ``q dW^`` and of ``dW^``, float32 ``[2, O, G]``."""
    rows, columns = gradient_OI.shape
    gradient_OI = gradient_OI.contiguous()
    sums = torch.empty(2, rows, groups, dtype=torch.float32, device=words.device)
    size, count = columns // groups, rows * groups
    width = HELD_VALUES if size > LARGEST_HELD_GROUP else triton.next_power_of_2(size)
    height = max(1, HELD_VALUES // width)
    launcher: Any = _group_gradients[(triton.cdiv(count, height),)]
    launcher(
        *(gradient_OI, words, sums, count, gradient_OI.numel()),
        GROUP=size,
        BITS=bits,
        ROWS=height,
        COLUMNS=width,
    )
    return sums


@group_gradients.register_fake
def _(gradient_OI: Tensor, words: Tensor, groups: int, bits: int) -> Tensor:
    return gradient_OI.new_empty((2, gradient_OI.shape[0], groups), dtype=torch.float32)


def try_out(device: torch.device) -> None:
    """Compile and run the kernels once; raises what stands in its way."""
    words = torch.zeros(1, 3, dtype=torch.int32, device=device)
    scale = torch.ones(1, 1, device=device)
    for bits in (2, 3):
        weight = dequantize(words, scale, scale.to(torch.uint8), bits, torch.float32)
        group_gradients(weight, words, 1, bits)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@triton.jit
def _fields(words_ptr, value, present, BITS: tl.constexpr):
    """The integers at places ``value`` (counted from where ``words_ptr`` points) of a stream of bits."""
    bit = value * BITS
    shift = (bit & 31).to(tl.uint32)
    low = tl.load(words_ptr + (bit >> 5), mask=present, other=0).to(tl.uint32, bitcast=True)
    field = low >> shift
    if 32 % BITS != 0:
        # Some values continue in the next word.
        torn = present & (shift + BITS > 32)
        high = tl.load(words_ptr + (bit >> 5) + 1, mask=torn, other=0).to(tl.uint32, bitcast=True)
        field = field | (high << ((32 - shift) & 31))
    return (field & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _dequantize(
    words_ptr, scale_ptr, zero_ptr, out_ptr, count,
    GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    # Addresses of 64 bits once a program, offsets of 32 within it.
    first = tl.program_id(0).to(tl.int64) * VALUES
    value = tl.arange(0, VALUES)
    present = first + value < count
    q = _fields(words_ptr + first * BITS // 32, value, present, BITS)
    group = (first + value) // GROUP
    scale = tl.load(scale_ptr + group, mask=present, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + group, mask=present, other=0).to(tl.float32)
    tl.store(out_ptr + first + value, ((q - zero) * scale).to(out_ptr.dtype.element_ty), mask=present)


@triton.jit
def _dequantize_words(
    words_ptr, scale_ptr, zero_ptr, out_ptr, count,
    GROUP: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The same where a word holds whole values of one group: each is read once, as are its scale and zero
    point."""
    HELD: tl.constexpr = 32 // BITS
    first = tl.program_id(0).to(tl.int64) * WORDS
    out_ptr += first * HELD
    word = tl.arange(0, WORDS)
    place = tl.arange(0, HELD)
    present = first + word < count
    packed = tl.load(words_ptr + first + word, mask=present, other=0).to(tl.uint32, bitcast=True)
    group = (first + word) // (GROUP // HELD)
    scale = tl.load(scale_ptr + group, mask=present, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + group, mask=present, other=0).to(tl.float32)
    q = ((packed[:, None] >> (place * BITS).to(tl.uint32)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)
    value = ((q - zero[:, None]) * scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + word[:, None] * HELD + place[None, :], value, mask=present[:, None])


@triton.jit
def _group_gradients(
    grad_ptr, words_ptr, sums_ptr, groups, count,
    GROUP: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first = program * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    present = first + row < groups
    weighted = tl.zeros((ROWS,), dtype=tl.float32)
    plain = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, GROUP, COLUMNS):
        value = (first + row)[:, None] * GROUP + start + column[None, :]
        here = present[:, None] & (start + column < GROUP)[None, :]
        gradient = tl.load(grad_ptr + value, mask=here, other=0.0).to(tl.float32)
        q = _fields(words_ptr, value, here, BITS)
        weighted += tl.sum(gradient * q, axis=1)
        plain += tl.sum(gradient, axis=1)
    tl.store(sums_ptr + first + row, weighted, mask=present)
    tl.store(sums_ptr + groups + first + row, plain, mask=present)
