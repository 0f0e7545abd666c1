"""Unpacking and the gradients of scales by a kernel, against the plain computation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from engine.config.grid import Grid
from engine.quant import packed_kernels
from engine.quant.grid import dequantize
from engine.quant.packed import Kernels, PackedLinear, PackedWeight, _group_sums, _PackedMatmul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [
    (1, 32, 32),
    (5, 64, 32),
    (33, 160, 32),
    (7, 1024, 1024),
    (3, 4128, 4128),
    (64, 256, 128),
    (2, 96, 48),
]
"""Out features, in features, group size."""


def random_weight(shape: tuple[int, int, int], bits: int) -> PackedWeight:
    out, inputs, group = shape
    generator = torch.Generator().manual_seed(bits + out)
    codes = torch.randint(0, 2**bits, (out, inputs), generator=generator)
    zero = torch.randint(0, 2**bits, (out, inputs // group), generator=generator).float()
    scale = torch.rand(zero.shape, generator=generator) * 0.1 + 0.01
    return PackedWeight.from_codes(codes.to(torch.uint8), scale, zero, Grid(bits, group)).to(DEVICE)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unpacked_weights_have_the_bits_of_the_plain_form(
    shape: tuple[int, int, int], bits: int, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter rounds to bfloat16 as no GPU does")
    weight = random_weight(shape, bits)
    scale = weight.scale.float() * 1.0001  # trained ones are no float16 numbers
    expected = dequantize(weight.codes(), scale, weight.zero_point).to(dtype)
    for zero in (weight.zero_point, weight.zero_point.float()):
        unpacked = packed_kernels.dequantize(weight.words, scale, zero, bits, dtype)
        assert torch.equal(unpacked, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_over_groups_are_those_of_the_plain_form(shape: tuple[int, int, int], bits: int) -> None:
    weight = random_weight(shape, bits)
    gradient = torch.randn(shape[:2], device=DEVICE)
    groups = weight.scale.shape[1]
    for one in (gradient, gradient.t().contiguous().t(), gradient.half()):
        weighted, plain = packed_kernels.group_gradients(one, weight.words, groups, bits).unbind()
        exact = _group_sums(one.double(), weight.words, groups, bits, kernels=False)
        size = shape[2] ** 0.5 * 2**bits
        assert torch.allclose(weighted, exact[0], rtol=1e-4, atol=1e-4 * size)
        assert torch.allclose(plain, exact[1], rtol=1e-4, atol=1e-4 * size)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_and_learns_the_same_with_and_without_kernels(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight((96, 256, 64), bits)
    x, upstream = torch.randn(2, 7, 256, device=DEVICE), torch.randn(2, 7, 96, device=DEVICE)
    results: list[list[Tensor]] = []
    for on in (False, True):
        monkeypatch.setattr(Kernels, "on", on)
        layer = PackedLinear(weight)
        layer.scale.requires_grad_(True)
        zero = layer.train_zero_points()
        leaf = x.to(dtype).requires_grad_(True)
        out = layer(leaf)
        out.backward(upstream.to(dtype))
        assert leaf.grad is not None
        assert layer.scale.grad is not None
        assert zero.grad is not None
        results.append([out.detach(), leaf.grad, layer.scale.grad, zero.grad])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for plain, kernel in zip(results[0][2:], results[1][2:], strict=True):
        # At 16 bits the plain form rounds every product before it adds them up.
        error = (plain - kernel).norm() / plain.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_kernel_that_does_not_work_leaves_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(packed_kernels, "try_out", failing)
    monkeypatch.setattr(Kernels, "on", False)
    with pytest.raises(RuntimeError, match="C compiler"):
        Kernels.switch_on(DEVICE)
    assert not Kernels.on


def test_a_compiled_layer_keeps_no_float_weight_for_the_backward_pass() -> None:
    """The compiler sees the same unpacking twice; done once, every layer's weight would stay in memory."""
    weight = random_weight((96, 256, 64), 2)
    scale = weight.scale.float().requires_grad_(True)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = _PackedMatmul.apply(x, weight.words, scale, weight.zero_point, 2, True)
        return out * 2

    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled = torch.compile(forward, backend="aot_eager", dynamic=False)
        out = compiled(torch.randn(4, 256, device=DEVICE, requires_grad=True))
    assert saved
    assert not any(t.is_floating_point() and t.numel() == 96 * 256 for t in saved)
    out.sum().backward()
    assert scale.grad is not None
