"""What a step of :mod:`engine.quant.quant_step` is told, by one kernel (Triton): whether it is taken, and
AdamW's bias corrections.

    skip         = the gradients' norm or the loss is not finite
    bad in a row = how many steps were skipped in a row, without those that float16's loss scale explains
    beta^t       of the t steps that were taken, from which 1 - beta1^t and sqrt(1 - beta2^t)

By torch's kernels that is fifty launches of a number each, which took 0.2 of the 10 ms of a 7B block's step
on one of four GPUs. The powers are kept as running products, in float64, because corrections are differences
of nearly equal numbers; who goes on from a count multiplies as often (:meth:`Decision.taken`), for the same
bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.quant.quant_step import CONTROLS


class Decision:
    """Of a training on ``device`` with these ``betas``; what a kernel reads and writes of it stays where it
    is, so that a step can be recorded. ``bad`` and ``worst`` count the bad steps in a row, now and at worst.
    """

    def __init__(
        self, betas: tuple[float, float], device: torch.device, *, bad: Tensor, worst: Tensor, scaled: bool
    ) -> None:
        self._betas, self._scaled = betas, scaled
        self._bad, self._worst = bad, worst
        self.controls = torch.zeros(CONTROLS, device=device)
        """In the order of :data:`~engine.quant.quant_step.SKIP` to ``GRAD_FACTOR``."""
        self.skip = torch.zeros((), device=device)
        self._counts = torch.zeros(3, dtype=torch.float64, device=device)
        """Steps that were taken, and the powers of both betas."""
        self.taken(0)

    @property
    def count(self) -> Tensor:
        """Steps that were taken, float64."""
        return self._counts[0]

    def taken(self, count: int) -> None:
        """Go on after so many steps."""
        powers = [1.0, 1.0]
        for _ in range(count):
            powers = [power * beta for power, beta in zip(powers, self._betas, strict=True)]
        self._counts.copy_(torch.tensor([float(count), *powers], dtype=torch.float64))

    def __call__(self, norms: Tensor, loss: Tensor, factor: Tensor, scale: Tensor) -> Tensor:
        """Decide, from the ``norms`` of all gradients (float32, at least one) and the ``loss``; ``factor`` is
        the learning rates', ``scale`` the loss's. What comes back is 1 if the step is skipped, else 0."""
        launcher: Any = _decide[(1,)]
        launcher(
            *(norms, loss, factor, scale, self._counts, self._bad, self._worst, self.controls, self.skip),
            norms.numel(),
            BETA1=self._betas[0],
            BETA2=self._betas[1],
            SCALED=self._scaled,
            BLOCK=triton.next_power_of_2(norms.numel()),
            num_warps=1,
        )
        return self.skip


def try_out(device: torch.device) -> None:
    """Compile and run the kernel once; raises what stands in its way."""
    zero, one = torch.zeros((), device=device), torch.ones(1, device=device)
    for scaled in (False, True):
        decision = Decision((0.9, 0.999), device, bad=zero, worst=zero, scaled=scaled)
        decision(one, one, one, one).item()


@triton.jit
def _decide(
    norms_ptr, loss_ptr, factor_ptr, scale_ptr, counts_ptr, bad_ptr, worst_ptr, controls_ptr, skip_ptr, norms,
    BETA1: tl.constexpr, BETA2: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    norm = tl.load(norms_ptr + at, mask=at < norms, other=0.0)
    total = tl.sum(norm * norm, axis=0)
    loss = tl.load(loss_ptr)
    scale = tl.load(scale_ptr)
    # What is not a number is not below infinity either.
    overflow = tl.where(total < float("inf"), 0.0, 1.0)
    nonsense = tl.where(tl.abs(loss) < float("inf"), 0.0, 1.0)
    skip = tl.maximum(overflow, nonsense)
    bad = skip
    if SCALED:
        # Gradients that overflow while the factor settles are expected; unscaled ones are not.
        bad = tl.maximum(tl.where(scale <= 1.0, overflow, 0.0), nonsense)
    in_a_row = (tl.load(bad_ptr) + 1.0) * bad
    tl.store(bad_ptr, in_a_row)
    tl.store(worst_ptr, tl.maximum(tl.load(worst_ptr), in_a_row))
    tl.store(skip_ptr, skip)
    count = tl.load(counts_ptr)
    power1 = tl.load(counts_ptr + 1)
    power2 = tl.load(counts_ptr + 2)
    takes = skip == 0.0
    count = tl.where(takes, count + 1.0, count)
    power1 = tl.where(takes, power1 * BETA1, power1)
    power2 = tl.where(takes, power2 * BETA2, power2)
    tl.store(counts_ptr, count)
    tl.store(counts_ptr + 1, power1)
    tl.store(counts_ptr + 2, power2)
    # In the order of SKIP to GRAD_FACTOR.
    tl.store(controls_ptr, skip)
    tl.store(controls_ptr + 1, tl.load(factor_ptr))
    tl.store(controls_ptr + 2, (1.0 - power1).to(tl.float32))
    tl.store(controls_ptr + 3, tl.sqrt_rn((1.0 - power2).to(tl.float32)))
    tl.store(controls_ptr + 4, 1.0 / scale)
