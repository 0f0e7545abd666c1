"""A chunk's loss and the gradient of its logits, on a GPU (Triton).

With the logits ``s`` and the teacher's ``t`` of a position, ``p`` and ``q`` their softmax, ``w`` the weight
of the text, ``y`` the label and ``v`` 1 where there is one::

    loss  = sum q (log q - log p) + w v (-log p_y)
          = sum q (t - s) - lse t + lse s + w v (lse s - s_y)
    ds    = (1 + w v) p - q - w v [y]

and without a teacher ``v (lse s - s_y)`` and ``v (p - [y])``. Both are known from the two logsumexp, so the
kernels read the logits twice and write their gradient: 10 bytes a logit in a 16-bit type, 6 without a
teacher, where torch's own operations, forward and backward in float32, move 110 and 40.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.evaluation.compare_kernel import counted_from

COLUMNS = 2048
"""Logits that a program has in hand."""
WARPS = 8


def loss_and_gradient(
    logits_TV: Tensor, labels_T: Tensor, teacher_TV: Tensor | None, text_weight: float, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """What :func:`~engine.methods.network.head_loss.token_loss` gives, and the gradient ``[T, V]`` of that
    times ``factor`` (float32, of one element), in the logits' dtype. Sums are float32; labels int64."""
    tokens, width = logits_TV.shape
    logits_TV = logits_TV.contiguous()
    taught = teacher_TV is not None
    teacher_TV = teacher_TV.contiguous() if teacher_TV is not None else logits_TV
    found_3T = torch.empty(3, tokens, dtype=torch.float32, device=logits_TV.device)
    gradient_TV = torch.empty_like(logits_TV)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    how = {"TAUGHT": taught, "WIDTH": width, "COLUMNS": columns, "num_warps": WARPS}
    sums: Any = _sums[(tokens,)]
    sums(logits_TV, teacher_TV, labels_T, found_3T, tokens, text_weight, **how)
    differentiate: Any = _gradients[(tokens,)]
    differentiate(
        *(logits_TV, teacher_TV, labels_T, found_3T, factor, gradient_TV, tokens, text_weight), **how
    )
    return found_3T[2].sum(), gradient_TV


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Compile and run the kernels once; raises what stands in its way."""
    logits = torch.zeros(1, 2, dtype=dtype, device=device)
    labels, one = torch.zeros(1, dtype=torch.int64, device=device), torch.ones((), device=device)
    for teacher in (None, logits):
        loss_and_gradient(logits, labels, teacher, 0.1, one)[0].item()


@triton.jit
def _sums(
    logits_ptr, teacher_ptr, labels_ptr, found_ptr, tokens, text_weight,
    TAUGHT: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    # Addresses of 64 bits once a program, offsets of 32 within it.
    logits_ptr += row.to(tl.int64) * WIDTH
    teacher_ptr += row.to(tl.int64) * WIDTH
    at = tl.arange(0, COLUMNS)
    # Of each place in a program's hands the largest so far, and sums that are counted from it.
    most = tl.full((COLUMNS,), float("-inf"), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    most_taught = tl.full((COLUMNS,), float("-inf"), tl.float32)
    total_taught = tl.zeros((COLUMNS,), tl.float32)
    apart = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        here = first + at < WIDTH
        own = tl.load(logits_ptr + first + at, mask=here, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, own)
        middle = counted_from(larger)
        total = total * tl.exp(most - middle) + tl.exp(own - middle)
        most = larger
        if TAUGHT:
            other = tl.load(teacher_ptr + first + at, mask=here, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(most_taught, other)
            middle = counted_from(larger)
            kept = tl.exp(most_taught - middle)
            part = tl.exp(other - middle)
            total_taught = total_taught * kept + part
            apart = apart * kept + tl.where(part == 0.0, 0.0, part * (other - own))
            most_taught = larger
    largest = tl.max(most, axis=0)
    own_sum = largest + tl.log(tl.sum(total * tl.exp(most - largest), axis=0))
    label = tl.load(labels_ptr + row)
    labelled = label >= 0
    said = tl.load(logits_ptr + tl.maximum(label, 0)).to(tl.float32)
    text = tl.where(labelled, own_sum - said, 0.0)
    loss = text
    taught_sum = own_sum
    if TAUGHT:
        largest = tl.max(most_taught, axis=0)
        scaled = tl.exp(most_taught - largest)
        weight = tl.sum(total_taught * scaled, axis=0)
        taught_sum = largest + tl.log(weight)
        loss = tl.sum(apart * scaled, axis=0) / weight - taught_sum + own_sum
        loss += text_weight * text
    tl.store(found_ptr + row, own_sum)
    tl.store(found_ptr + tokens + row, taught_sum)
    tl.store(found_ptr + 2 * tokens + row, loss)


@triton.jit
def _gradients(
    logits_ptr, teacher_ptr, labels_ptr, found_ptr, factor_ptr, gradient_ptr, tokens, text_weight,
    TAUGHT: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * WIDTH
    teacher_ptr += row.to(tl.int64) * WIDTH
    gradient_ptr += row.to(tl.int64) * WIDTH
    own_sum = tl.load(found_ptr + row)
    taught_sum = tl.load(found_ptr + tokens + row)
    factor = tl.load(factor_ptr)
    label = tl.load(labels_ptr + row)
    text = tl.where(label >= 0, 1.0, 0.0)
    whole = text
    if TAUGHT:
        text = text_weight * text
        whole = 1.0 + text
    at = tl.arange(0, COLUMNS)
    for first in range(0, WIDTH, COLUMNS):
        here = first + at < WIDTH
        own = tl.load(logits_ptr + first + at, mask=here, other=0.0).to(tl.float32)
        found = whole * tl.exp(own - own_sum) - tl.where(first + at == label, text, 0.0)
        if TAUGHT:
            other = tl.load(teacher_ptr + first + at, mask=here, other=0.0).to(tl.float32)
            found -= tl.exp(other - taught_sum)
        tl.store(gradient_ptr + first + at, (factor * found).to(gradient_ptr.dtype.element_ty), mask=here)
