"""Packed weights: exact storage, and a matmul whose gradients are those of the plain computation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from engine.config.grid import Grid, GridConfig
from engine.quant.fake_linear import FakeQuantLinear, freeze_block, wrap_linears
from engine.quant.grid import dequantize
from engine.quant.packed import (
    LARGEST_STORED_SCALE,
    SMALLEST_STORED_SCALE,
    Domain,
    PackedBlock,
    PackedLinear,
    PackedWeight,
    into_domain,
    overlaid,
    smallest_trained,
    unpacked,
)


def random_packed(bits: int, groups: int, out: int = 32, inputs: int = 96, seed: int = 0) -> PackedWeight:
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out, inputs), generator=gen).to(torch.uint8)
    zero = torch.randint(0, 2**bits, (out, groups), generator=gen).float()
    zero.view(-1)[0], zero.view(-1)[1] = 0, 2**bits - 1
    scale = torch.rand(out, groups, generator=gen) * 0.1 + 0.01
    return PackedWeight.from_codes(codes, scale, zero, Grid(bits, inputs // groups))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("train_zero", [False, True])
def test_packed_matmul_and_its_gradients_match_the_plain_computation(
    bits: int, groups: int, train_zero: bool
) -> None:
    weight = random_packed(bits, groups, seed=bits)
    layer = PackedLinear(weight, torch.randn(32))
    layer.scale.requires_grad_(True)
    zero = layer.train_zero_points() if train_zero else weight.zero_point.float()
    x = torch.randn(2, 5, 96, requires_grad=True)
    upstream = torch.randn(2, 5, 32)
    out = layer(x)
    out.backward(upstream)

    plain_x = x.detach().clone().requires_grad_(True)
    plain_scale = layer.scale.detach().clone().requires_grad_(True)
    plain_zero = zero.detach().clone().requires_grad_(True)
    codes = weight.codes().float().reshape(32, groups, -1)
    plain_weight = ((codes - plain_zero.unsqueeze(-1)) * plain_scale.unsqueeze(-1)).reshape(32, 96)
    plain = functional.linear(plain_x, plain_weight, layer.bias)
    plain.backward(upstream)

    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.scale.grad, plain_scale.grad, rtol=1e-4, atol=1e-3)
    if train_zero:
        torch.testing.assert_close(layer.zero_point.grad, plain_zero.grad, rtol=1e-4, atol=1e-3)


def test_packed_linear_keeps_no_float_weight_for_the_backward_pass() -> None:
    layer = PackedLinear(random_packed(2, 3))
    layer.scale.requires_grad_(True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(4, 96, requires_grad=True))
    assert saved
    assert not any(t.is_floating_point() and t.shape == (32, 96) for t in saved)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_blocks_survive_a_round_trip_bit_for_bit(bits: int) -> None:
    block = PackedBlock(
        {"a.proj": random_packed(bits, 3), "b": random_packed(bits, 1, seed=1)},
        {"norm.weight": torch.randn(7).half(), "a.proj.bias": torch.randn(32).half()},
    )
    again = PackedBlock.from_tensors(block.tensors(), Grid(bits, 32))
    assert again.tensors().keys() == block.tensors().keys()
    for name, tensor in block.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name


MIXED = {"first": Grid(3, 32), "second": Grid(8, -1, symmetric=True)}


def mixed_block() -> tuple[TwoLinears, PackedBlock]:
    """A block whose linears have different grids, trained and frozen."""
    torch.manual_seed(1)
    block = TwoLinears().requires_grad_(False)
    return block, freeze_block(block, wrap_linears(block, MIXED))


def test_linears_of_a_block_keep_grids_of_their_own() -> None:
    _, packed = mixed_block()
    again = PackedBlock.from_tensors(packed.tensors(), Grid(2, 64))
    assert {name: weight.grid for name, weight in again.linears.items()} == MIXED
    assert [again.linears[name].group_size for name in MIXED] == [32, 96]
    assert again.linears["second"].zero_point.unique().tolist() == [128]
    for name, tensor in packed.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name


@pytest.mark.parametrize("dense", [False, True])
def test_what_is_trained_in_a_block_does_not_move_the_packed_one(dense: bool) -> None:
    """Another training may begin at the same; of float32 values, as blocks on a CPU have them, too."""
    _, packed = mixed_block()
    wide = {
        name: replace(weight, scale=weight.scale.float(), zero_point=weight.zero_point.float())
        for name, weight in packed.linears.items()
    }
    packed = PackedBlock(wide, {name: tensor.float() for name, tensor in packed.others.items()})
    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    block = TwoLinears()
    (packed.install_dense if dense else packed.install)(block)
    if not dense:
        for name in MIXED:
            block.get_submodule(name).train_zero_points()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1)
    for name, tensor in packed.tensors().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dense", [False, True])
def test_a_block_of_mixed_grids_computes_with_each_of_them(dense: bool) -> None:
    trained, packed = mixed_block()
    x = torch.randn(3, 64)
    fresh = TwoLinears().requires_grad_(False)
    again = PackedBlock.from_tensors(packed.tensors(), Grid(2, 64))
    computed = (again.install_dense(fresh) if dense else again.install(fresh))(x)
    for name, weight in packed.linears.items():
        plain = (weight.codes().float().reshape(weight.out_features, -1, weight.group_size)) - (
            weight.zero_point.float().unsqueeze(-1)
        )
        linear = nn.Linear(weight.in_features, weight.out_features, bias=name == "first")
        linear.weight.data = (plain * weight.scale.float().unsqueeze(-1)).reshape(linear.weight.shape)
        if name == "first":
            linear.bias.data = packed.others["first.bias"].float()
        setattr(trained, name, linear)
    trained.norm.weight.data = packed.others["norm.weight"].float()
    torch.testing.assert_close(computed, trained(x), rtol=1e-5, atol=1e-5)
    if not dense:
        assert {name: fresh.get_submodule(name).packed().grid for name in MIXED} == MIXED


def test_an_entry_of_an_earlier_version_has_the_grid_of_the_configuration() -> None:
    block = PackedBlock({"a.proj": random_packed(3, 3)}, {"norm.weight": torch.randn(7).half()})
    earlier = {name: tensor for name, tensor in block.tensors().items() if not name.endswith(".grid")}
    assert sorted(earlier) == [
        "linear.a.proj.scale",
        "linear.a.proj.words",
        "linear.a.proj.zero_point",
        "other.norm.weight",
    ]
    again = PackedBlock.from_tensors(earlier, GridConfig(bits=3, group_size=32).shared)
    assert again.linears["a.proj"].grid == Grid(3, 32, symmetric=False)
    assert again.tensors().keys() == block.tensors().keys()
    for name, tensor in block.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name


@pytest.mark.parametrize(
    ("grid", "stored"),
    [
        (Grid(2, 32), [2, 32, 0]),
        (Grid(4, 32, symmetric=True), [4, 32, 1]),
        (Grid(2, 32, fixed_zero_point=2), [2, 32, 1]),
        (Grid(2, 32, fixed_zero_point=1), [2, 32, 2]),
        (Grid(8, -1, fixed_zero_point=1), [8, -1, 2]),
    ],
)
def test_a_stored_linear_says_where_its_zero_points_are_fixed(grid: Grid, stored: list[int]) -> None:
    """The first two as versions stored them that knew no other fixed zero point than a symmetric grid's."""
    packed = FakeQuantLinear.of_linear(nn.Linear(64, 32, bias=False), grid).freeze()
    tensors = PackedBlock({"a": packed}).tensors()
    assert tensors["linear.a.grid"].tolist() == stored
    assert PackedBlock.from_tensors(tensors, Grid(3, 64)).linears["a"].grid == grid


def test_a_grid_that_the_scales_do_not_have_is_refused() -> None:
    weight = random_packed(3, 3)
    with pytest.raises(ValueError, match="3 scales a row"):
        replace(weight, grid=Grid(3, 96))


@pytest.mark.parametrize("prefix", ["", "linear."])
def test_what_a_later_stage_made_lies_over_the_block(prefix: str) -> None:
    block = PackedBlock({"a": random_packed(3, 3), "b": random_packed(3, 1)}, {"norm.weight": torch.ones(7)})
    later = {
        f"{prefix}a.scale": torch.full((32, 3), 0.5).half(),
        f"{prefix}a.zero_point": torch.full((32, 3), 2, dtype=torch.uint8),
        "other.norm.weight": torch.zeros(7),
    }
    both = PackedBlock.from_tensors(overlaid(block.tensors(), later), Grid(3, 32))
    assert both.linears["a"].scale.unique().tolist() == [0.5]
    assert both.linears["a"].zero_point.unique().tolist() == [2]
    assert torch.equal(both.linears["a"].words, block.linears["a"].words)
    assert torch.equal(both.linears["b"].scale, block.linears["b"].scale)
    assert both.others["norm.weight"].tolist() == [0.0] * 7
    with pytest.raises(ValueError, match=r"the block has no c\.scale"):
        overlaid(block.tensors(), {"c.scale": torch.ones(1)})


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96, bias=True)
        self.norm = nn.LayerNorm(96, bias=False)
        self.second = nn.Linear(96, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fixed", ["", "middle", "one"])
def test_a_frozen_block_computes_what_the_trained_one_did(bits: int, fixed: str) -> None:
    torch.manual_seed(bits)
    block = TwoLinears().requires_grad_(False)
    zero = {"": None, "middle": 2 ** (bits - 1), "one": 1}[fixed]
    grid = Grid(bits, 32, fixed_zero_point=zero)
    linears = wrap_linears(block, {"first": grid, "second": grid})
    with torch.no_grad():
        for linear in linears.values():
            # Exactly representable scales, as after rounding them to float16.
            linear.scale.copy_(linear.scale.half().float())
        block.norm.weight.copy_(torch.randn(96).half().float())
        block.first.bias.copy_(block.first.bias.half().float())
    x = torch.randn(3, 64)
    trained = block(x)
    packed = freeze_block(block, linears)
    assert set(packed.others) == {"first.bias", "norm.weight"}
    if zero is not None:
        assert packed.linears["second"].zero_point.unique().tolist() == [zero]

    fresh = packed.install(TwoLinears().requires_grad_(False))
    torch.testing.assert_close(fresh(x), trained, rtol=1e-5, atol=1e-5)
    assert isinstance(fresh.first, PackedLinear)


def test_freezing_chooses_integers_for_the_float16_scale_that_is_saved() -> None:
    linear = nn.Linear(64, 8, bias=False)
    fake = FakeQuantLinear.of_linear(linear, Grid(8, 64))
    with torch.no_grad():
        fake.scale.mul_(1.0003)
    packed = fake.freeze()
    assert packed.scale.dtype == torch.float16
    error = (dequantize(packed.codes(), packed.scale.float(), packed.zero_point) - linear.weight).abs()
    inside = (packed.codes() > 0) & (packed.codes() < 255)
    assert (error[inside] <= packed.scale.float().expand(8, 64)[inside] * 0.5001).all()


def test_projection_keeps_scales_positive_and_zero_points_in_range() -> None:
    fake = FakeQuantLinear.of_linear(nn.Linear(64, 8, bias=False), Grid(2, 32))
    floor = fake.scale_floor.clone()
    with torch.no_grad():
        fake.scale.fill_(-1.0)
        fake.zero_point.fill_(7.0)
    fake.project()
    assert torch.equal(fake.scale, floor)
    assert (floor > 0).all()
    assert fake.zero_point.unique().tolist() == [3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unpacked_layer_computes_the_same_bits_and_is_packed_again_afterwards(dtype: torch.dtype) -> None:
    layer, x = PackedLinear(random_packed(3, 3)), torch.randn(5, 96).to(dtype)
    layer.scale.requires_grad_(True)
    with torch.no_grad():
        expected = layer(x)
        with unpacked(nn.Sequential(layer), dtype):
            assert torch.equal(layer(x), expected)
            # It was made once: the packed words are not looked at.
            layer.words.zero_()
            assert torch.equal(layer(x), expected)
        assert not torch.equal(layer(x), expected)
    assert layer.unpacked is None


def test_an_unpacked_layer_still_learns_from_its_packed_weight() -> None:
    layer, x = PackedLinear(random_packed(3, 3)), torch.randn(5, 96)
    layer.scale.requires_grad_(True)
    layer(x).square().sum().backward()
    assert layer.scale.grad is not None
    expected, layer.scale.grad = layer.scale.grad, None
    with unpacked(nn.Sequential(layer), torch.float32):
        layer(x).square().sum().backward()
    assert torch.equal(layer.scale.grad, expected)


def test_training_keeps_scales_where_a_file_can_hold_them() -> None:
    """One rule for a scale on its way into a file, however it comes there."""
    fake = FakeQuantLinear.of_linear(nn.Linear(64, 8, bias=False), Grid(2, 32))
    with torch.no_grad():
        fake.scale.fill_(1e6)
    fake.project()
    assert fake.scale.unique().tolist() == [LARGEST_STORED_SCALE]
    assert torch.equal(fake.freeze().scale.float(), fake.scale)


def test_a_grid_begins_where_a_file_can_hold_it() -> None:
    """Weights beyond what float16 reaches, and weights too small for it."""
    linear = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        linear.weight[:4] *= 1e7
        linear.weight[4:] *= 1e-12
    fake = FakeQuantLinear.of_linear(linear, Grid(2, 32), method="minmax")
    assert fake.scale.max() <= LARGEST_STORED_SCALE
    assert fake.scale_floor.min() >= SMALLEST_STORED_SCALE
    with torch.no_grad():
        fake.scale.zero_()
    fake.project()
    assert (fake.freeze().scale > 0).all()


@pytest.mark.parametrize(
    ("trained", "saved"), [(1e6, LARGEST_STORED_SCALE), (1e-9, SMALLEST_STORED_SCALE), (0.0, 2.0**-24)]
)
def test_a_scale_out_of_range_is_saved_by_the_same_rule_from_codes_and_from_a_layer(
    trained: float, saved: float
) -> None:
    layer = PackedLinear(random_packed(3, 3))
    with torch.no_grad():
        layer.scale.fill_(trained)
    assert layer.packed().scale.unique().tolist() == [saved]
    codes, zero = torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(8, 2)
    weight = PackedWeight.from_codes(codes, torch.full((8, 2), trained), zero, Grid(3, 32))
    assert weight.scale.unique().tolist() == [saved]


def test_what_is_not_quantized_is_frozen_without_loss_unless_it_was_trained() -> None:
    """A norm that float16 cannot hold, a bias that it would round, and a trained one, which it does round."""
    block = TwoLinears().requires_grad_(False)
    with torch.no_grad():
        block.norm.weight.fill_(7e4)
        block.first.bias.copy_(torch.full_like(block.first.bias, 2.0**-30 + 0.1))
    exact = {name: value.clone() for name, value in block.named_parameters() if "linear" not in name}
    packed = freeze_block(block, wrap_linears(block, {name: Grid(4, 32) for name in ("first", "second")}))
    assert torch.equal(packed.others["norm.weight"], exact["norm.weight"])
    assert torch.equal(packed.others["first.bias"], exact["first.bias"])
    again = TwoLinears().requires_grad_(False)
    again.norm.weight.requires_grad_(True)
    with torch.no_grad():
        again.norm.weight.fill_(0.1)
    packed = freeze_block(again, wrap_linears(again, {name: Grid(4, 32) for name in ("first", "second")}))
    assert packed.others["norm.weight"].dtype == torch.float16


@pytest.mark.parametrize("sides", ["above", "below", "both"])
def test_many_scales_enter_their_domain_together_as_each_does_alone(sides: str) -> None:
    """To the last bit, whatever the optimizer has left."""
    gen = torch.Generator().manual_seed(3)
    scales, zeros = [], []
    for shape in [(4, 3), (1, 1), (33, 7), (2, 64)]:
        scale = torch.rand(shape, generator=gen) + 0.01
        if sides == "below" or (sides == "both" and len(scales) % 2):
            scale = torch.where(torch.rand(shape, generator=gen) < 0.6, -scale, scale)
        scales.append(scale)
        zeros.append(torch.rand(shape, generator=gen) * 3)
    floors = [smallest_trained(scale, 0.01) for scale in scales]
    tops = [3.0, 7.0, 15.0, 3.0]
    domain = Domain(scales, floors, zeros, tops)
    odd = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e6, -1e6, float("inf"), -float("inf"), float("nan")])
    for _ in range(3):
        for tensor in (*scales, *zeros):
            step = torch.randn(tensor.shape, generator=gen)
            drawn = odd[torch.randint(0, len(odd), tensor.shape, generator=gen)]
            tensor.copy_(torch.where(torch.rand(tensor.shape, generator=gen) < 0.3, drawn, tensor + step))
        alone = [into_domain(scale, floor) for scale, floor in zip(scales, floors, strict=True)]
        inside = [zero.clone().clamp_(0, top) for zero, top in zip(zeros, tops, strict=True)]
        places = [tensor.data_ptr() for tensor in (*scales, *zeros)]
        domain.enter()
        assert places == [tensor.data_ptr() for tensor in (*scales, *zeros)]
        for found, expected in zip([*scales, *zeros], [*alone, *inside], strict=True):
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_nothing_enters_where_nothing_is_trained() -> None:
    Domain([], []).enter()
    zero = torch.tensor([-1.0, 9.0])
    Domain([], [], [zero], [3.0]).enter()
    assert zero.tolist() == [0.0, 3.0]
