"""LR-QAT's weight and gradients by a kernel, against the plain computation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from engine.config.grid import Grid
from engine.config.latents import Downcast
from engine.quant import low_rank_kernel
from engine.quant.downcast import downcast
from engine.quant.low_rank import Kernel, _Frozen, latent_steps, low_rank_matmul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 32, 32), (5, 64, 16), (33, 160, 32), (7, 1024, 1024), (40, 256, 128), (3, 576, 64), (2, 96, 96)]
"""Out features, in features, group size."""


def layer(
    shape: tuple[int, int, int], bits: int, form: Downcast, rank: int, factor: torch.dtype
) -> tuple[list[Tensor], _Frozen]:
    """Latents, where they are counted from, factors, scale and zero point."""
    out, inputs, group = shape
    generator = torch.Generator().manual_seed(out * bits + rank)
    grid = Grid(bits, group)
    zero = torch.randint(0, grid.top + 1, (out, inputs // group), generator=generator).float()
    steps = torch.rand(out, inputs, generator=generator) * (grid.top + 4) - 2
    steps = (steps.view(*zero.shape, -1) - zero.unsqueeze(-1)).view(out, inputs)
    kept, origin = downcast(steps, zero, grid, form), zero.to(torch.uint8)
    a, b = (torch.randn(shape, generator=generator).to(factor) for shape in ((out, rank), (rank, inputs)))
    scale = torch.rand(zero.shape, generator=generator) * 0.1 + 0.01
    moved = (zero + torch.rand(zero.shape, generator=generator) - 0.5).clamp(0, grid.top)
    made = [kept, origin, a, b, scale, moved]
    return [tensor.to(DEVICE) for tensor in made], _Frozen(grid, 1.0 / rank)


def passed(tensors: list[Tensor], frozen: _Frozen, x: Tensor, back: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of input, factors, scale and zero point."""
    kept, origin, *trained = (tensor.clone() for tensor in tensors)
    x = x.clone().requires_grad_()
    for tensor in trained:
        tensor.requires_grad_()
    out = low_rank_matmul(x, kept, origin, *trained, frozen)
    out.backward(back)
    return [out.detach(), *(tensor.grad for tensor in (x, *trained) if tensor.grad is not None)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["bfloat16", "float16", "fixed"])
def test_output_and_gradients_are_those_of_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], bits: int, form: Downcast
) -> None:
    rank, factor = (3, torch.float32) if bits % 2 else (32, torch.bfloat16)
    tensors, frozen = layer(shape, bits, form, rank, factor)
    kept, origin, a, b, *_ = tensors
    # A sum that lies between two integers may become either: only the others can be compared.
    ties = (latent_steps(kept, origin, a, b, frozen) % 1 - 0.5).abs() < 1e-4
    if ties.any():
        kept.masked_fill_(ties, 0)
        a[ties.any(1)] = 0
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 3, shape[1], generator=generator).to(DEVICE)
    back = torch.randn(2, 3, shape[0], generator=generator).to(DEVICE)
    monkeypatch.setattr(Kernel, "on", False)
    expected = passed(tensors, frozen, x, back)
    asked: list[bool] = []
    launch = low_rank_kernel._launch
    monkeypatch.setattr(low_rank_kernel, "_launch", lambda *args: (asked.append(True), launch(*args)))
    monkeypatch.setattr(Kernel, "on", True)
    found = passed(tensors, frozen, x, back)
    assert len(asked) == (2 if low_rank_kernel.takes(kept, rank, shape[1] // shape[2]) else 0)
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        wide = other.float().abs().max() + 1e-6
        assert ((one.float() - other.float()).abs().max() / wide) < (
            2e-2 if one.dtype == torch.bfloat16 else 2e-4
        )


def test_a_recomputed_layer_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, frozen = layer((40, 256, 128), 3, "fixed", 8, torch.float32)
    x = torch.randn(2, 256, device=DEVICE)
    monkeypatch.setattr(Kernel, "on", True)
    found = []
    for recomputed in (False, True):
        trained = [tensor.clone().requires_grad_() for tensor in tensors[2:]]
        arguments = (x.clone().requires_grad_(), *tensors[:2], *trained, frozen)
        out = (
            checkpoint(low_rank_matmul, *arguments, use_reentrant=False)
            if recomputed
            else low_rank_matmul(*arguments)
        )
        out.square().sum().backward()
        found.append([out, *(tensor.grad for tensor in trained)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_compiler_keeps_no_weight_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, recomputed: bool
) -> None:
    """With the partitioner that decides what is kept, and no other part of a compiler."""
    monkeypatch.setattr(Kernel, "on", True)
    tensors, frozen = layer((256, 256, 128), 3, "fixed", 8, torch.float32)
    x = torch.randn(2, 256, device=DEVICE)

    def two_layers(x: Tensor, *tensors: Tensor) -> Tensor:
        middle = torch.nn.functional.silu(low_rank_matmul(x, *tensors, frozen))
        return low_rank_matmul(middle, *tensors, frozen)

    compiled = torch.compile(two_layers, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    found = []
    for function in (two_layers, compiled):
        trained = [tensor.clone().requires_grad_() for tensor in tensors[2:]]
        arguments = (x.clone().requires_grad_(), *tensors[:2], *trained)
        kept: list[torch.Size] = []

        def pack(tensor: Tensor, kept: list[torch.Size] = kept) -> Tensor:
            if tensor.is_floating_point():
                kept.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = (
                checkpoint(function, *arguments, use_reentrant=False) if recomputed else function(*arguments)
            )
        out.square().sum().backward()
        assert (256, 256) not in kept
        found.append([out.detach(), arguments[0].grad, *(tensor.grad for tensor in trained)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_groups_that_no_tile_divides_and_packed_integers_are_left_to_the_plain_form() -> None:
    kept = torch.zeros(2, 96, dtype=torch.int8)
    assert low_rank_kernel.takes(kept, 32, 6), "groups of 16"
    assert low_rank_kernel.takes(kept, 32, 1), "of 96, in tiles of 32"
    assert not low_rank_kernel.takes(kept, 32, 4), "of 24"
    assert not low_rank_kernel.takes(kept, 200, 1)
    assert not low_rank_kernel.takes(torch.zeros(2, 96, dtype=torch.int32), 32, 1)
