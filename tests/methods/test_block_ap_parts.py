"""The parts of Block-AP that can be switched on: each does what it is for, and off it leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from quiet import Heard
from torch import Tensor

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.methods.advance import Portions, advance
from engine.methods.blockwise.block_ap import BlockResult, train_block
from engine.methods.blockwise.reconstruction import distance, distance_without_largest
from engine.methods.blockwise.streams import Streams
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.quant.fake_linear import FakeQuantLinear

CPU = torch.device("cpu")
TRAIN, VAL, LENGTH = 8, 2, 16
GRID = GridConfig(bits=2, group_size=32)


@pytest.fixture
def lm(tmp_path: Path) -> CausalLM:
    folder = tiny.build(tmp_path / "model", "llama2", num_hidden_layers=1)
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)


def uneven_stream(lm: CausalLM) -> Tensor:
    """Hidden states some of whose channels are many times larger than others."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.rand(lm.hidden_size, generator=generator) ** 4 + 0.02
    return torch.randn(TRAIN + VAL, LENGTH, lm.hidden_size, generator=generator) * sizes


def train(lm: CausalLM, **changes: object) -> BlockResult:
    return train_on(lm, streams_of(lm), **changes)


def streams_of(lm: CausalLM) -> Streams:
    hidden = uneven_stream(lm)
    full, quantized = (make_store("device", tuple(hidden.shape), torch.float32, CPU) for _ in range(2))
    full.write(0, hidden)
    quantized.write(0, hidden)
    return Streams(full, quantized, TRAIN)


def train_on(lm: CausalLM, streams: Streams, **changes: object) -> BlockResult:
    """Both streams stand before the block."""
    settings = {"batch_size": 4, "epochs": 2, "lr_weight": 0.02, "lr_quant": 0.005, **changes}
    config = BlockAPConfig(**settings)  # type: ignore[arg-type]
    heard = Heard()
    block = lm.load_block(0, dtype=torch.float32)
    advance(lm, 0, block, streams.full, Portions(4), torch.float32, heard)
    return train_block(
        lm, 0, block, streams, config, GRID, seed=1, dtype=torch.float32, progress=heard, keeper=heard
    )


# -- where grids start ---------------------------------------------------------------------------------


def test_a_start_that_weighs_channels_begins_with_a_lower_loss(lm: CausalLM) -> None:
    losses = {
        start: train(lm, start=start, epochs=1, train=("norms",)).initial_loss
        for start in ("range", "mse", "clip", "search")
    }
    assert losses["search"] < losses["clip"] < losses["mse"]
    assert losses["search"] < losses["range"]


def test_a_linear_starts_with_what_its_own_inputs_weigh(lm: CausalLM) -> None:
    """The sum of squares is that of the linear's inputs, hooks do not stay, and the weights are the
    block's."""
    from engine.methods.blockwise.start import input_squares

    block, streams = lm.load_block(0, dtype=torch.float32), streams_of(lm)
    names = GRID.of_each(lm.linear_names(0))
    config = BlockAPConfig(batch_size=3)
    found = input_squares(lm, 0, block, streams, config, names, torch.float32)
    normed = block.get_submodule("input_layernorm")(streams.quantized.read(range(TRAIN)))
    expected = normed.square().flatten(0, -2).sum(0)
    assert torch.allclose(found["self_attn.q_proj"], expected, rtol=1e-4)
    assert set(found) == set(names)
    assert found["mlp.down_proj"].shape == (128,)
    relative = input_squares(
        lm, 0, block, streams, BlockAPConfig(batch_size=3, search_tokens="relative"), names, torch.float32
    )
    tokens = TRAIN * LENGTH
    for squares in relative.values():
        assert squares.mean().item() == pytest.approx(tokens, rel=1e-3)
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert not any(isinstance(module, FakeQuantLinear) for module in block.modules())


# -- errors that are left out --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "token_relative_mse"])
def test_the_largest_errors_are_left_out(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 5, 8, generator=generator)
    errors = torch.randn(2, 5, 8, generator=generator) * 0.1
    errors[1, 2, 3], errors[0, 4, 1] = 50.0, -30.0
    output = (target + errors).requires_grad_(True)
    loss = distance_without_largest(output, target, kind, 2 / 80)
    (gradient,) = torch.autograd.grad(loss, output)
    assert gradient[1, 2, 3] == gradient[0, 4, 1] == 0
    assert (gradient != 0).sum() == 78
    errors[1, 2, 3] = errors[0, 4, 1] = 0
    calm = distance(target + errors, target, kind)
    assert loss.item() == pytest.approx(calm.item() * 80 / 78, rel=1e-4)


def test_training_that_leaves_errors_out_is_another_and_lowers_the_loss(lm: CausalLM) -> None:
    usual, robust = train(lm), train(lm, drop_largest=0.01)
    assert robust.initial_loss == usual.initial_loss
    assert robust.final_loss < robust.initial_loss
    assert robust.final_loss != usual.final_loss
