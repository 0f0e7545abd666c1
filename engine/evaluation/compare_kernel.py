"""Two models' logits compared in one reading of each, on a GPU (Triton).

With the logits ``z`` of full precision and ``y`` of the other model at a position, ``lse`` the logarithm of
the sum of their exponentials, ``p`` the softmax of ``z``, and ``t`` the label::

    nll          lse z - z_t,  lse y - y_t
    KL           sum p (z - y) - lse z + lse y
    agreement    argmax z = argmax y, of equal logits the first
    logit error  max |z - y|

All of them are known after one pass: what is summed is counted from the largest logit so far. So 4 bytes of a
token of the vocabulary are read in a 16-bit type, where torch's own operations, in float32, move about 130.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048
"""Logits that a program has in hand."""
WARPS = 8
MEASURES = 5


def compared(full_TV: Tensor, other_TV: Tensor, labels_T: Tensor) -> Tensor:
    """What :func:`engine.evaluation.beside.compared` gives: float32 ``[5, T]``. ``labels_T`` are int64."""
    full_TV, other_TV = full_TV.contiguous(), other_TV.contiguous()
    tokens, width = full_TV.shape
    found_5T = torch.empty(MEASURES, tokens, dtype=torch.float32, device=full_TV.device)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    compare: Any = _compare[(tokens,)]
    compare(full_TV, other_TV, labels_T, found_5T, tokens, WIDTH=width, COLUMNS=columns, num_warps=WARPS)
    return found_5T


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Compile and run the kernel once; raises what stands in its way."""
    logits = torch.zeros(2, COLUMNS, dtype=dtype, device=device)
    compared(logits, logits, torch.zeros(2, dtype=torch.int64, device=device))[0, 0].item()


@triton.jit
def _compare(full_ptr, other_ptr, labels_ptr, found_ptr, tokens, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    # Addresses of 64 bits once a program, offsets of 32 within it.
    full_ptr += row.to(tl.int64) * WIDTH
    other_ptr += row.to(tl.int64) * WIDTH
    at = tl.arange(0, COLUMNS)
    # Of each place in a program's hands the largest so far and the first that is as large, sums that are
    # counted from it, and the largest error. What is no number is in the sums.
    most = tl.full((COLUMNS,), float("-inf"), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    apart = tl.zeros((COLUMNS,), tl.float32)
    first = at
    most_other = tl.full((COLUMNS,), float("-inf"), tl.float32)
    total_other = tl.zeros((COLUMNS,), tl.float32)
    first_other = at
    error = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        here = start + at < WIDTH
        full = tl.load(full_ptr + start + at, mask=here, other=float("-inf")).to(tl.float32)
        other = tl.load(other_ptr + start + at, mask=here, other=float("-inf")).to(tl.float32)
        # A token that is impossible in both differs by nothing, while infinity minus infinity is no number.
        difference = tl.where(full == other, 0.0, full - other)
        error = tl.maximum(error, tl.abs(difference))

        first = tl.where(full > most, start + at, first)
        larger = tl.maximum(most, full)
        middle = counted_from(larger)
        kept = tl.exp(most - middle)
        part = tl.exp(full - middle)
        total = total * kept + part
        apart = apart * kept + tl.where(part == 0.0, 0.0, part * difference)
        most = larger

        first_other = tl.where(other > most_other, start + at, first_other)
        larger = tl.maximum(most_other, other)
        middle = counted_from(larger)
        total_other = total_other * tl.exp(most_other - middle) + tl.exp(other - middle)
        most_other = larger
    label = tl.load(labels_ptr + row)
    largest = tl.max(most, axis=0)
    scaled = tl.exp(most - largest)
    weight = tl.sum(total * scaled, axis=0)
    full_sum = largest + tl.log(weight)
    divergence = tl.sum(apart * scaled, axis=0) / weight
    likeliest = tl.min(tl.where(most == largest, first, WIDTH), axis=0)
    largest = tl.max(most_other, axis=0)
    other_sum = largest + tl.log(tl.sum(total_other * tl.exp(most_other - largest), axis=0))
    agrees = likeliest == tl.min(tl.where(most_other == largest, first_other, WIDTH), axis=0)
    divergence += other_sum - full_sum
    known = divergence == divergence
    found_ptr += row
    tl.store(found_ptr, full_sum - tl.load(full_ptr + label).to(tl.float32))
    tl.store(found_ptr + tokens, other_sum - tl.load(other_ptr + label).to(tl.float32))
    # Rounding may leave a little less than nothing.
    tl.store(found_ptr + 2 * tokens, tl.where(known, tl.maximum(divergence, 0.0), divergence))
    tl.store(found_ptr + 3 * tokens, agrees.to(tl.float32))
    tl.store(found_ptr + 4 * tokens, tl.where(known, tl.max(error, axis=0), divergence))


@triton.jit
def counted_from(largest):
    """What sums are counted from: where there is nothing yet but minus infinity, zero."""
    return tl.where(largest == float("-inf"), 0.0, largest)
