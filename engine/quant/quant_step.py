"""One optimizer step of a fake-quantized weight in one pass over memory (Triton).

Between two matrix products a training step of a linear's weight does four things, each of them a trip through
memory in its plain form:

    1. the gradient goes back through the quantizer (:mod:`engine.quant.grid`): dW^ -> dW, ds, dz
    2. AdamW moves ``W``, ``s`` and ``z`` (arXiv 1711.05101, algorithm 2, as torch computes it)
    3. ``s`` and ``z`` are brought back into their domain
    4. the new ``W`` is quantized for the next forward pass: W^ = (q - z) s

The quantizer couples only the weights of one group, so a program that holds a group in registers can do all
of it with every number read once and written once: 28 bytes a weight at 16-bit arithmetic (master weight and
two moments in and out, gradient in, quantized weight out) instead of 48.

A matrix ``[O, I]`` is seen as ``[O * G, group_size]`` groups, which lie behind each other in memory. Small
groups are held whole, several to a program; large ones (whole rows) are walked through in two launches.

Divisions and square roots are rounded as IEEE 754 says, so that a weight gets the integer that the plain code
would give it. The plain form of all this is ``fake_quantize`` with torch's AdamW; the tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.quant.packed import LARGEST_STORED_SCALE

LARGEST_HELD_GROUP = 512
HELD_VALUES = 1024
"""Weights that a program holds at a time. With 2048, too few programs fit beside each other to keep the
memory busy: 0.43 ms instead of 0.38 for 45 million weights in groups of 64 on an H200."""
WALKED_VALUES = 2048
"""The same of a group that is walked through."""

# Places in the vector of what changes from step to step, float32 on the device.
SKIP, LR_FACTOR, CORRECTION1, ROOT_CORRECTION2, GRAD_FACTOR = range(5)
CONTROLS = 5


@dataclass(frozen=True)
class Moments:
    """A parameter, AdamW's two moments of it, and its learning rate before the schedule."""

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    lr: float


@dataclass(frozen=True)
class QuantStep:
    """The step of one linear. Of what is not trained only the value is read; its moments are never touched.

    ``gradient`` (any float dtype) and ``quantized`` (the arithmetic's dtype) are ``[O, I]`` and contiguous;
    ``squares`` receives the sum of squares of all gradients, one partial sum a program.
    """

    weight: Moments
    scale: Moments
    zero_point: Moments
    scale_floor: Tensor
    quantized: Tensor
    bits: int
    trains: tuple[bool, ...]
    """Weight, scale, zero point."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    in_steps: bool = False
    """Whether the weight is counted in grid steps (:func:`~engine.quant.grid.fake_quantize_steps`)."""

    @property
    def groups(self) -> int:
        return self.scale.value.numel()

    @property
    def group_size(self) -> int:
        return self.weight.value.numel() // self.groups

    @property
    def held(self) -> tuple[int, int]:
        """Groups of a program, and how many columns of them it holds at a time."""
        if self.group_size > LARGEST_HELD_GROUP:
            return 1, WALKED_VALUES
        columns = triton.next_power_of_2(self.group_size)
        return max(1, HELD_VALUES // columns), columns

    def programs(self) -> int:
        """Programs of a launch."""
        return triton.cdiv(self.groups, self.held[0])

    def apply(self, gradient: Tensor, controls: Tensor, squares: Tensor) -> None:
        """Steps 1 to 4; nothing changes where ``controls[SKIP]`` is not 0."""
        assert gradient.is_contiguous(), "a gradient that is not row-major"
        self._launch(gradient, controls, squares, updates=True)
        if self.group_size > self.held[1]:
            # Step 4 reads what step 2 has written, in another order: a launch of its own sees all of it.
            self._launch(self.quantized, controls, squares, updates=False)

    def requantize(self, controls: Tensor, squares: Tensor) -> None:
        """Step 4 alone."""
        self._launch(self.quantized, controls, squares, updates=False)

    def _launch(self, gradient: Tensor, controls: Tensor, squares: Tensor, updates: bool) -> None:
        rows, columns = self.held
        w, s, z = self.weight, self.scale, self.zero_point
        launcher: Any = _quant_step[(self.programs(),)]
        launcher(
            *(w.value, w.exp_avg, w.exp_avg_sq),
            *(s.value, s.exp_avg, s.exp_avg_sq),
            *(z.value, z.exp_avg, z.exp_avg_sq),
            *(self.scale_floor, gradient, self.quantized, controls, squares),
            *(self.groups, w.lr, s.lr, z.lr, self.weight_decay),
            GROUP=self.group_size,
            TOP=2**self.bits - 1,
            LARGEST=LARGEST_STORED_SCALE,
            BETA1=self.betas[0],
            BETA2=self.betas[1],
            EPS=self.eps,
            TRAIN_W=self.trains[0],
            TRAIN_S=self.trains[1],
            TRAIN_Z=self.trains[2],
            IN_STEPS=self.in_steps,
            UPDATES=updates,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
        )


def try_out(device: torch.device) -> None:
    """Compile and run both forms of the kernel once; raises what stands in its way."""

    def ones(count: int) -> Moments:
        value, avg, square = torch.ones(3, 1, count, device=device).unbind()
        return Moments(value, avg, square, lr=0.0)

    scale = ones(1)
    step = QuantStep(
        ones(32),
        scale,
        ones(1),
        scale_floor=scale.value,
        quantized=torch.zeros(1, 32, device=device),
        bits=2,
        trains=(True, True, True),
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    )
    controls, squares = torch.ones(CONTROLS, device=device), torch.zeros(1, device=device)
    step.requantize(controls, squares)
    step.apply(step.quantized, controls, squares)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@triton.jit
def _round(x):
    """To the nearest integer, halves to even, for ``|x| < 2^22``."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _levels(weight, scale, zero, IN_STEPS: tl.constexpr):
    """``round(W / s) + z``, and ``W / s``; far outside the grid any large number will do."""
    ratio = weight if IN_STEPS else tl.div_rn(weight, scale)
    return _round(tl.minimum(tl.maximum(ratio, -1024.0), 1024.0)) + zero, ratio


@triton.jit
def _adamw(value, gradient, avg, square, lr, decay, correction1, root2, BETA1, BETA2, EPS):
    value = value - lr * decay * value
    avg = avg + (1.0 - BETA1) * (gradient - avg)
    square = BETA2 * square + (1.0 - BETA2) * gradient * gradient
    denominator = tl.div_rn(tl.sqrt_rn(square), root2) + EPS
    return value - tl.div_rn(lr, correction1) * tl.div_rn(avg, denominator), avg, square


@triton.jit
def _quant_step(
    w_ptr, w_avg_ptr, w_square_ptr, s_ptr, s_avg_ptr, s_square_ptr, z_ptr, z_avg_ptr, z_square_ptr,
    floor_ptr, grad_ptr, out_ptr, control_ptr, squares_ptr,
    groups, lr_w, lr_s, lr_z, decay,
    GROUP: tl.constexpr, TOP: tl.constexpr, LARGEST: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    TRAIN_W: tl.constexpr, TRAIN_S: tl.constexpr, TRAIN_Z: tl.constexpr,
    IN_STEPS: tl.constexpr, UPDATES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first = program * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    present = first + row < groups
    # Addresses of 64 bits once a program, offsets of 32 within it.
    w_ptr += first * GROUP
    w_avg_ptr += first * GROUP
    w_square_ptr += first * GROUP
    grad_ptr += first * GROUP
    out_ptr += first * GROUP
    scale = tl.load(s_ptr + first + row, mask=present, other=1.0)
    raw_zero = tl.load(z_ptr + first + row, mask=present, other=0.0)
    rounded_zero = _round(raw_zero)
    zero = tl.minimum(tl.maximum(rounded_zero, 0.0), TOP)
    HELD: tl.constexpr = GROUP <= COLUMNS
    weight = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    changes = present

    if UPDATES:
        # All that is read is asked for before any of it is needed, and nothing branches: a program waits for
        # memory once. A skipped step stores nothing. (A flag a row: Triton's interpreter cannot combine a
        # scalar one with a mask.)
        # The controls lie in the order of SKIP to GRAD_FACTOR.
        changes = present & (tl.load(control_ptr + 0 * row) == 0.0)
        factor = tl.load(control_ptr + 1)
        correction1 = tl.load(control_ptr + 2)
        root2 = tl.load(control_ptr + 3)
        grad_factor = tl.load(control_ptr + 4)
        if TRAIN_Z:
            z_avg = tl.load(z_avg_ptr + first + row, mask=present, other=0.0)
            z_square = tl.load(z_square_ptr + first + row, mask=present, other=0.0)
        if TRAIN_S:
            s_avg = tl.load(s_avg_ptr + first + row, mask=present, other=0.0)
            s_square = tl.load(s_square_ptr + first + row, mask=present, other=0.0)
            scale_floor = tl.load(floor_ptr + first + row, mask=present, other=1.0)
        scale_grad = tl.zeros((ROWS,), dtype=tl.float32)
        zero_grad = tl.zeros((ROWS,), dtype=tl.float32)
        squares = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, GROUP, COLUMNS):
            at = row[:, None] * GROUP + start + column[None, :]
            here = present[:, None] & (start + column < GROUP)[None, :]
            weight = tl.load(w_ptr + at, mask=here, other=0.0)
            gradient = tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float32) * grad_factor
            if TRAIN_W:
                avg = tl.load(w_avg_ptr + at, mask=here, other=0.0)
                square = tl.load(w_square_ptr + at, mask=here, other=0.0)
            level, ratio = _levels(weight, scale[:, None], zero[:, None], IN_STEPS)
            inside = (level >= 0.0) & (level <= TOP)
            centred = tl.minimum(tl.maximum(level, 0.0), TOP) - zero[:, None]
            # A weight that is counted in steps scales with its grid, another one stays where it is.
            slope = centred if IN_STEPS else centred - tl.where(inside, ratio, 0.0)
            scale_grad += tl.sum(gradient * slope, axis=1)
            zero_grad -= tl.sum(tl.where(inside, 0.0, gradient), axis=1)
            if TRAIN_W:
                gradient = tl.where(inside, gradient, 0.0)
                if IN_STEPS:
                    gradient = gradient * scale[:, None]
                squares += tl.sum(gradient * gradient, axis=1)
                weight, avg, square = _adamw(
                    weight, gradient, avg, square, lr_w * factor, decay, correction1, root2, BETA1, BETA2, EPS
                )
                here = here & changes[:, None]
                tl.store(w_ptr + at, weight, mask=here)
                tl.store(w_avg_ptr + at, avg, mask=here)
                tl.store(w_square_ptr + at, square, mask=here)
        if TRAIN_Z:
            moves = (rounded_zero >= 0.0) & (rounded_zero <= TOP)
            zero_grad = tl.where(moves, zero_grad * scale, 0.0)
            squares += zero_grad * zero_grad
            raw_zero, z_avg, z_square = _adamw(
                raw_zero,
                zero_grad,
                z_avg,
                z_square,
                lr_z * factor,
                decay,
                correction1,
                root2,
                BETA1,
                BETA2,
                EPS,
            )
            raw_zero = tl.minimum(tl.maximum(raw_zero, 0.0), TOP)
            zero = _round(raw_zero)
            tl.store(z_ptr + first + row, raw_zero, mask=changes)
            tl.store(z_avg_ptr + first + row, z_avg, mask=changes)
            tl.store(z_square_ptr + first + row, z_square, mask=changes)
        if TRAIN_S:
            squares += scale_grad * scale_grad
            scale, s_avg, s_square = _adamw(
                scale,
                scale_grad,
                s_avg,
                s_square,
                lr_s * factor,
                decay,
                correction1,
                root2,
                BETA1,
                BETA2,
                EPS,
            )
            # Each on the side of zero where its floor is.
            side = tl.where(scale_floor < 0.0, -1.0, 1.0)
            scale = tl.minimum(tl.maximum(scale * side, scale_floor * side), LARGEST) * side
            tl.store(s_ptr + first + row, scale, mask=changes)
            tl.store(s_avg_ptr + first + row, s_avg, mask=changes)
            tl.store(s_square_ptr + first + row, s_square, mask=changes)

    if HELD or not UPDATES:
        for start in range(0, GROUP, COLUMNS):
            at = row[:, None] * GROUP + start + column[None, :]
            here = present[:, None] & (start + column < GROUP)[None, :]
            if not UPDATES:
                weight = tl.load(w_ptr + at, mask=here, other=0.0)
            level, _ratio = _levels(weight, scale[:, None], zero[:, None], IN_STEPS)
            value = (tl.minimum(tl.maximum(level, 0.0), TOP) - zero[:, None]) * scale[:, None]
            tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=here & changes[:, None])

    if UPDATES:
        squared = tl.sum(tl.where(changes, squares, 0.0), axis=0)
        tl.store(squares_ptr + program, squared)
