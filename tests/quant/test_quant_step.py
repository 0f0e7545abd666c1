"""One kernel for the way back through the quantizer, AdamW and the new quantized weights, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from engine.config.grid import Grid
from engine.quant.grid import fake_quantize, fake_quantize_steps, initial_range
from engine.quant.packed import LARGEST_STORED_SCALE, into_domain
from engine.quant.quant_step import CONTROLS, SKIP, Moments, QuantStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RATES = (0.01, 0.005, 0.05)
BETAS = (0.9, 0.999)
ALL = (True, True, True)


class Both:
    """The same linear in the kernel's hands and in torch's."""

    def __init__(
        self,
        shape: tuple[int, int],
        group_size: int,
        bits: int,
        *,
        fixed: int | None = None,
        trains: tuple[bool, bool, bool] = ALL,
        decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        in_steps: bool = False,
        negative: bool = False,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.bits, self.trains, self.shape = bits, trains, shape
        weight = self.normal()
        scale, zero = initial_range(weight, Grid(bits, group_size, fixed_zero_point=fixed))
        if fixed is None:  # trained ones are no whole numbers, and some lie at the ends
            zero = (zero + 0.3 * torch.randn(zero.shape, generator=self.generator).to(DEVICE)).clamp_(
                0, 2**bits - 1
            )
        if negative:  # as others make them, and we where groups turn round
            scale[::2] *= -1
        self.floor = 0.99 * scale
        self.quantize = fake_quantize_steps if in_steps else fake_quantize
        if in_steps:
            weight = weight / scale.repeat_interleave(shape[1] // scale.shape[1], 1)
        self.masters = [nn.Parameter(value.clone(), requires_grad=False) for value in (weight, scale, zero)]
        trained = [
            {"params": [p.requires_grad_(True)], "lr": lr}
            for p, lr, wanted in zip(self.masters, RATES, trains, strict=True)
            if wanted
        ]
        self.optimizer = torch.optim.AdamW(trained, betas=BETAS, weight_decay=decay)
        self.rates = [group["lr"] for group in trained]
        moments = [
            Moments(value.clone(), torch.zeros_like(value), torch.zeros_like(value), lr)
            for value, lr in zip((weight, scale, zero), RATES, strict=True)
        ]
        self.quantized = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        self.kernel = QuantStep(
            *moments,
            scale_floor=self.floor,
            quantized=self.quantized,
            bits=bits,
            trains=trains,
            betas=BETAS,
            eps=1e-8,
            weight_decay=decay,
            in_steps=in_steps,
        )
        self.squares = torch.full((self.kernel.programs(),), torch.nan, device=DEVICE)
        self.step_number = 0

    def normal(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator).to(DEVICE)

    def values(self) -> list[Tensor]:
        return [m.value for m in (self.kernel.weight, self.kernel.scale, self.kernel.zero_point)]

    def controls(self, factor: float, grad_factor: float = 1.0, skip: float = 0.0) -> Tensor:
        count = max(1, self.step_number)
        corrections = 1 - BETAS[0] ** count, (1 - BETAS[1] ** count) ** 0.5
        return torch.tensor([skip, factor, *corrections, grad_factor], device=DEVICE)

    def step(self, gradient: Tensor, factor: float, grad_factor: float) -> Tensor:
        """In both; returns torch's squared norm of the gradients."""
        self.step_number += 1
        self.kernel.apply(gradient, self.controls(factor, grad_factor), self.squares)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        weight, scale, zero = self.masters
        self.quantize(weight, scale, zero, self.bits).backward(gradient.float() * grad_factor)
        squared = sum(p.grad.double().square().sum() for p in self.masters if p.grad is not None)
        self.optimizer.step()
        with torch.no_grad():
            if self.trains[1]:
                scale.copy_(into_domain(scale, self.floor))
            if self.trains[2]:
                zero.clamp_(0, 2**self.bits - 1)
        return torch.as_tensor(squared)

    def follow(self) -> None:
        """Torch goes on from where the kernel is, so that one rounding does not become another integer."""
        with torch.no_grad():
            for parameter, value in zip(self.masters, self.values(), strict=True):
                parameter.copy_(value)


CASES: list[tuple[tuple[int, int], int, int, dict[str, Any]]] = [
    ((5, 64), 32, 2, {}),
    ((3, 172), 172, 3, {}),  # a row that is no power of two
    ((33, 128), 64, 4, {"dtype": torch.float16}),
    ((7, 1024), -1, 8, {}),  # rows too long to be held whole
    ((3, 5000), -1, 2, {}),
    ((2, 513), -1, 4, {}),
    ((9, 256), 128, 2, {"fixed": 2, "trains": (True, True, False)}),
    ((5, 172), 172, 2, {"fixed": 1, "trains": (True, True, False)}),
    ((3, 1025), -1, 2, {"fixed": 1, "trains": (False, True, False)}),
    ((7, 96), 32, 3, {"fixed": 4, "trains": (True, True, False)}),
    ((4, 64), 32, 3, {"decay": 0.1}),
    ((4, 64), 32, 3, {"trains": (False, True, False)}),
    ((4, 512), 256, 4, {"trains": (True, False, False)}),
    ((130, 96), 48, 2, {}),
    ((1, 32), 32, 8, {"trains": (False, False, True)}),
    ((5, 64), 32, 2, {"fixed": 1, "trains": (True, True, False), "negative": True}),
    ((5, 64), 32, 2, {"in_steps": True}),
    ((3, 172), 172, 3, {"in_steps": True, "trains": (True, True, False)}),
    ((3, 1025), -1, 2, {"in_steps": True, "decay": 0.1}),
    ((33, 128), 64, 4, {"in_steps": True, "dtype": torch.float16}),
    ((5, 64), 32, 4, {"in_steps": True, "fixed": 8, "trains": (True, True, False), "negative": True}),
]


@pytest.mark.parametrize(("shape", "group_size", "bits", "options"), CASES)
def test_steps_are_those_of_torch(
    shape: tuple[int, int], group_size: int, bits: int, options: dict[str, Any]
) -> None:
    both = Both(shape, group_size, bits, **options)
    for factor, grad_factor in ((1.0, 1.0), (0.5, 0.25), (0.25, 1.0), (0.1, 2.0)):
        squared = both.step(both.normal(), factor, grad_factor)
        for value, wanted, rate in zip(both.values(), both.masters, RATES, strict=True):
            # Of whole rows at 8 bits the plain form subtracts two large sums for the gradient of a scale.
            assert torch.allclose(value, wanted, rtol=1e-6, atol=(1e-2 if bits == 8 else 2e-4) * rate)
        assert torch.allclose(both.squares.double().sum(), squared, rtol=1e-3)
        both.follow()
        expected = both.quantize(*both.masters, bits).to(both.quantized.dtype)
        assert torch.equal(both.quantized, expected), "the next forward pass sees these very weights"


@pytest.mark.parametrize(("shape", "group_size", "bits", "options"), CASES)
def test_quantizing_alone_gives_the_bits_of_the_plain_form(
    shape: tuple[int, int], group_size: int, bits: int, options: dict[str, Any]
) -> None:
    both = Both(shape, group_size, bits, seed=1, **options)
    before = [value.clone() for value in both.values()]
    both.kernel.requantize(torch.zeros(CONTROLS, device=DEVICE), both.squares)
    assert torch.equal(both.quantized, both.quantize(*both.masters, bits).to(both.quantized.dtype))
    assert all(torch.equal(a, b) for a, b in zip(before, both.values(), strict=True))


@pytest.mark.parametrize("shape", [(6, 64), (3, 1024)], ids=["held", "walked"])
def test_scales_stay_where_a_file_can_hold_them(shape: tuple[int, int]) -> None:
    both = Both(shape, 32 if shape[1] == 64 else -1, 2, trains=(False, True, False))
    both.kernel.scale.value.fill_(1e6)
    both.step_number = 1
    both.kernel.apply(both.normal(), both.controls(0.0), both.squares)
    assert both.kernel.scale.value.unique().tolist() == [LARGEST_STORED_SCALE]


def test_a_skipped_step_changes_nothing() -> None:
    both = Both((6, 64), 32, 2)
    both.step(both.normal(), 1.0, 1.0)
    before = [t.clone() for t in (*both.values(), both.kernel.weight.exp_avg, both.quantized)]
    controls = both.controls(1.0, skip=1.0)
    assert controls[SKIP] == 1
    both.kernel.apply(torch.full(both.shape, torch.nan, device=DEVICE), controls, both.squares)
    after = [*both.values(), both.kernel.weight.exp_avg, both.quantized]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert both.squares.sum() == 0


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter rounds to bfloat16 as no GPU does")
@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_weights_are_rounded_as_torch_rounds(gradient_dtype: torch.dtype) -> None:
    both = Both((512, 1024), 64, 2, dtype=torch.bfloat16)
    for factor in (1.0, 0.5):
        both.step(both.normal().to(gradient_dtype), factor, 1.0)
        both.follow()
        assert torch.equal(both.quantized, fake_quantize(*both.masters, 2).to(torch.bfloat16))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_addresses_beyond_32_bits_are_reached() -> None:
    """2.2 billion weights: more than a signed 32-bit offset counts."""
    rows, columns = 34_000, 65_536
    if torch.cuda.mem_get_info()[0] < rows * columns * 9:
        pytest.skip("not enough free memory")
    weight = torch.ones(rows, columns, device=DEVICE)
    scale, zero = (
        torch.full((rows, columns // 64), 0.5, device=DEVICE),
        torch.ones(rows, columns // 64, device=DEVICE),
    )
    quantized = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    nothing = Moments(scale, scale, scale, 0.0)
    kernel = QuantStep(
        Moments(weight, weight, weight, 0.0),
        nothing,
        Moments(zero, zero, zero, 0.0),
        scale_floor=scale,
        quantized=quantized,
        bits=2,
        trains=(False, False, False),
        betas=BETAS,
        eps=1e-8,
        weight_decay=0.0,
    )
    kernel.requantize(torch.zeros(CONTROLS, device=DEVICE), torch.zeros(kernel.programs(), device=DEVICE))
    assert bool((quantized[-1] == 1).all())
    assert bool((quantized[rows // 2] == 1).all())
