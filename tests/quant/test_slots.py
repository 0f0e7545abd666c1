"""A linear of a block is read and replaced by its slot."""

from __future__ import annotations

import torch
from torch import nn

from engine.config.grid import GridConfig
from engine.methods.blockwise.rtn import round_to_nearest
from engine.quant.fake_linear import FakeQuantLinear, wrap_linears
from engine.quant.packed import PackedLinear
from engine.quant.slots import slot, slots

GRID = GridConfig(bits=4, group_size=32)


def block() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32, bias=False))
    return nn.Sequential(inner, nn.Linear(32, 32)).requires_grad_(False)


def test_what_is_put_into_a_slot_is_what_the_block_computes_with() -> None:
    whole, x = block(), torch.randn(3, 32)
    for name in ("0.2", "1"):
        assert slot(whole, name).get() is whole.get_submodule(name)
        slot(whole, name).set(nn.Identity())
    assert torch.equal(whole(x), whole[0][1](whole[0][0](x)))  # type: ignore[index]


def test_slots_come_in_the_order_of_the_names() -> None:
    assert [place.name for place in slots(block(), ("1", "0.0"))] == ["1", "0.0"]


def test_a_quantized_block_has_its_linears_where_they_were() -> None:
    names = ("0.0", "0.2", "1")
    whole = block()
    wrapped = wrap_linears(whole, GRID.of_each(names))
    assert [place.get() for place in slots(whole, names)] == list(wrapped.values())
    assert all(isinstance(linear, FakeQuantLinear) for linear in wrapped.values())
    packed = round_to_nearest(block(), names, GRID)
    installed = packed.install(block())
    for place in slots(installed, names):
        linear = place.get()
        assert isinstance(linear, PackedLinear)
        assert torch.equal(linear.packed().words, packed.linears[place.name].words)
