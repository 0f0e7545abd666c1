"""The parts of Block-AP that can be switched on: each does what it is for, and off it leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
from quiet import Heard
from torch import Tensor

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.errors import NonFiniteError, StopRequested
from engine.methods.advance import Portions, advance
from engine.methods.blockwise import block_ap, start
from engine.methods.blockwise.block_ap import BlockResult, train_block
from engine.methods.blockwise.reconstruction import Streams, distance, distance_without_largest
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.quant.fake_linear import FakeQuantLinear
from engine.quant.range_search import search_range
from engine.training.snapshot import Snapshot

CPU = torch.device("cpu")
TRAIN, VAL, LENGTH = 8, 2, 16
STREAM_BATCHES = 3
"""In which the full-precision stream passes the block."""
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


def train(lm: CausalLM, **changes: Any) -> BlockResult:
    return train_on(lm, streams_of(lm), **changes)


def streams_of(lm: CausalLM) -> Streams:
    return stored(uneven_stream(lm))


def stored(hidden: Tensor) -> Streams:
    full, quantized = (make_store("device", tuple(hidden.shape), torch.float32, CPU) for _ in range(2))
    full.write(0, hidden)
    quantized.write(0, hidden)
    return Streams(full, quantized, TRAIN)


def train_on(
    lm: CausalLM,
    streams: Streams,
    *,
    grid: GridConfig = GRID,
    progress: Heard | None = None,
    snapshot: Snapshot | None = None,
    fast: bool = False,
    kernels: bool = False,
    **changes: object,
) -> BlockResult:
    """Both streams stand before the block."""
    settings = {"batch_size": 4, "epochs": 2, "lr_weight": 0.02, "lr_quant": 0.005, **changes}
    config = BlockAPConfig(**settings)  # type: ignore[arg-type]
    heard = progress or Heard()
    block = lm.load_block(0, dtype=torch.float32)
    advance(lm, 0, block, streams.full, Portions(4), torch.float32, heard)
    return train_block(
        *(lm, 0, block, streams, config, grid),
        seed=1,
        dtype=torch.float32,
        progress=heard,
        keeper=heard,
        snapshot=snapshot,
        fast=fast,
        kernels=kernels,
    )


# -- where grids start ---------------------------------------------------------------------------------


def test_a_start_that_weighs_channels_begins_with_a_lower_loss(lm: CausalLM) -> None:
    losses = {
        start: train(lm, start=start, epochs=1, train=("norms",)).initial_loss
        for start in ("range", "search")
    }
    assert losses["search"] < losses["range"]


def input_squares_of(lm: CausalLM, block: torch.nn.Module, streams: Streams, batch: int) -> dict[str, Tensor]:
    names = GRID.of_each(lm.linear_names(0))
    return start.input_squares(lm, 0, block, streams, names, torch.float32, Heard(), batch)


def test_a_linear_starts_with_what_its_own_inputs_weigh(lm: CausalLM) -> None:
    """The sum of squares is that of the linear's inputs, hooks do not stay, and the weights are the
    block's."""
    block, streams = lm.load_block(0, dtype=torch.float32), streams_of(lm)
    found = input_squares_of(lm, block, streams, 3)
    normed = block.get_submodule("input_layernorm")(streams.quantized.read(range(TRAIN)))
    expected = normed.square().flatten(0, -2).sum(0)
    assert torch.allclose(found["self_attn.q_proj"], expected, rtol=1e-4)
    assert set(found) == set(lm.linear_names(0))
    assert found["mlp.down_proj"].shape == (128,)
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert not any(isinstance(module, FakeQuantLinear) for module in block.modules())


def test_a_linear_that_is_given_nothing_starts_as_if_all_channels_counted_alike(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an expert that no token asks for."""
    real = start.input_squares

    def without_one(*args: Any) -> dict[str, Tensor]:
        found = real(*args)
        del found["mlp.up_proj"]
        return found

    monkeypatch.setattr(start, "input_squares", without_one)
    heard, streams, block = Heard(), streams_of(lm), lm.load_block(0, dtype=torch.float32)
    grids = GRID.of_each(lm.linear_names(0))
    found = start.searched_start(
        lm, 0, block, streams, grids, torch.float32, heard, start.AtOnce(4, 1 << 16)
    ).ranges
    even = search_range(block.get_submodule("mlp.up_proj").weight, GRID.shared, values=1 << 16)
    uneven = search_range(block.get_submodule("mlp.gate_proj").weight, GRID.shared, values=1 << 16)
    assert torch.equal(found["mlp.up_proj"][0], even[0])
    assert not torch.equal(found["mlp.gate_proj"][0], uneven[0])


@pytest.mark.parametrize(("zero_point", "symmetric", "held"), [("fixed", False, 1), ("learned", True, 2)])
def test_a_search_leaves_zero_points_where_the_grid_has_them(
    lm: CausalLM, zero_point: Literal["fixed", "learned"], symmetric: bool, held: int
) -> None:
    grid = GridConfig(bits=2, group_size=32, zero_point=zero_point, symmetric=symmetric)
    trained = ("weights", "scales", "norms")
    packed = train(lm, grid=grid, start="search", epochs=1, train=trained).packed
    assert len(packed.linears) == 7
    assert all((weight.zero_point == held).all() for weight in packed.linears.values())
    assert all((weight.scale < 0).any() == (not symmetric) for weight in packed.linears.values())


def test_channels_that_nothing_comes_through_do_no_harm(lm: CausalLM) -> None:
    hidden = uneven_stream(lm)
    hidden[..., ::3] = 0
    result = train_on(lm, stored(hidden), start="search", drop_largest=0.001)
    assert result.final_loss < result.initial_loss
    tensors = result.packed.tensors().values()
    assert all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())


# -- memory, stops and going on ------------------------------------------------------------------------


def limited(monkeypatch: pytest.MonkeyPatch, *, sequences: int, values: int) -> None:
    """More than so much at once has no memory."""
    squares, search = start.input_squares, start.search_range

    def some_squares(*args: Any) -> dict[str, Tensor]:
        if args[-1] > sequences:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return squares(*args)

    def some_search(weight: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if options["values"] > values and len(weight) > 64:  # not at the first linear
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return search(weight, *args, **options)

    monkeypatch.setattr(start, "input_squares", some_squares)
    monkeypatch.setattr(start, "search_range", some_search)


def test_where_memory_does_not_suffice_less_is_searched_at_a_time(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(lm, start="search")
    limited(monkeypatch, sequences=1, values=1 << 18)
    heard = Heard()
    result = train(lm, progress=heard, start="search")
    assert [code for code, _ in heard.warnings] == ["micro_batch", "micro_batch", "memory", "memory"]
    assert heard.warnings[0][1] == ("block 0: out of memory with 4 sequences at a time; going on with 2")
    assert result.final_loss == pytest.approx(whole.final_loss, rel=1e-3)


def test_where_nothing_is_left_to_halve_the_error_is_raised(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, sequences=0, values=0)
    with pytest.raises(torch.OutOfMemoryError):
        train(lm, start="search")


class Left(Heard):
    """A keeper that takes a state after so many steps, and leaves."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after
        self.left: Snapshot | None = None

    def step_boundary(self, state: Callable[[], Snapshot]) -> None:
        found = state()
        if found.facts["steps_done"] == self.after:
            tensors = {name: tensor.detach().clone() for name, tensor in found.tensors.items()}
            self.left = Snapshot(tensors, json.loads(json.dumps(found.facts)))
            raise StopRequested


@pytest.mark.parametrize("short", [False, True])
def test_a_training_goes_on_from_the_start_that_it_had(
    lm: CausalLM, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where memory was short when it started and is not any more."""
    knobs: dict[str, Any] = {"start": "search", "drop_largest": 0.01}
    with monkeypatch.context() as patched:
        if short:
            limited(patched, sequences=2, values=1 << 17)
        whole = train(lm, **knobs)
        left = Left(3)
        with pytest.raises(StopRequested):
            train(lm, progress=left, **knobs)
    assert left.left is not None
    noted = left.left.facts["noted"]
    at_once = (2, 1 << 17) if short else (4, 1 << 20)
    assert (noted["start_sequences"], noted["start_values"]) == at_once
    begun: list[start.AtOnce] = []
    real = block_ap.searched_start

    def watched(*args: Any, **options: Any) -> start.Start:
        begun.append(args[-1])
        return real(*args, **options)

    monkeypatch.setattr(block_ap, "searched_start", watched)
    result = train(lm, snapshot=left.left, **knobs)
    assert begun == [at_once]
    assert result.final_loss == whole.final_loss
    for name, tensor in whole.packed.tensors().items():
        assert torch.equal(tensor, result.packed.tensors()[name]), name


def test_a_training_in_which_no_groups_turned_round_goes_on(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that an earlier version had above zero stay there, where this one would begin below."""
    grid = GridConfig(bits=2, group_size=32, zero_point="fixed")
    knobs: dict[str, Any] = {
        "grid": grid,
        "train": ("weights", "scales"),
        "lr_scaling": "absolute",
        "lr_weight": 1e-3,
        "lr_quant": 1e-3,
    }
    with monkeypatch.context() as patched:
        patched.setattr(GridConfig, "shared", replace(grid.shared, turns=False))
        whole = train(lm, **knobs)
        left = Left(3)
        with pytest.raises(StopRequested):
            train(lm, progress=left, **knobs)
    assert all((weight.scale > 0).all() for weight in whole.packed.linears.values())
    assert any((weight.scale < 0).any() for weight in train(lm, **knobs).packed.linears.values())
    result = train(lm, snapshot=left.left, **knobs)
    for name, tensor in whole.packed.tensors().items():
        assert torch.equal(tensor, result.packed.tensors()[name]), name


@pytest.mark.parametrize("at", [1, 6])
def test_a_search_can_be_left(lm: CausalLM, at: int) -> None:
    """Before a batch of its statistics, and between two parts of it."""
    heard = Heard(stop_at=STREAM_BATCHES + at)
    with pytest.raises(StopRequested):
        train(lm, progress=heard, start="search")
    assert heard.boundaries == STREAM_BATCHES + at


# -- where Triton does not work ------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("fast", "words"),
    [(False, "the search is slower"), (True, "steps and the search before them are slower")],
)
def test_where_triton_does_not_work_torchs_forms_take_over(
    lm: CausalLM, fast: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr("engine.quant.range_kernel.try_out", broken)
    block_ap._obstacle.cache_clear()
    try:
        heard = Heard()
        result = train(lm, progress=heard, start="search", kernels=True, fast=fast)
    finally:
        block_ap._obstacle.cache_clear()
    assert heard.warnings == [
        ("compile", f"block 0: {words}, Triton does not work here: Failed to find C compiler")
    ]
    plain = train(lm, start="search")
    for name, tensor in plain.packed.tensors().items():
        assert torch.equal(tensor, result.packed.tensors()[name]), name


@pytest.mark.usefixtures("interpreted")
def test_kernels_search_only_where_they_are_wanted(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real = start.search_range

    def watched(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        asked.append(options["kernel"])
        return real(*args, **{**options, "kernel": False})

    monkeypatch.setattr(start, "search_range", watched)
    train(lm, start="search", epochs=1)
    assert asked == [False] * 7
    train(lm, start="search", epochs=1, kernels=True)
    assert asked == [False] * 7 + [True] * 7


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


@pytest.mark.parametrize("kind", ["mse", "token_relative_mse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_error_that_is_not_finite_is_not_left_out(kind: str, value: float) -> None:
    """It says that training diverges, and says it also where it is one of the largest."""
    target, output = torch.ones(2, 4, 8), torch.ones(2, 4, 8) * 1.1
    output[1, 2, 3] = value
    assert not distance_without_largest(output, target, kind, 0.1).isfinite()
    assert not distance_without_largest(torch.full_like(output, value), target, kind, 0.1).isfinite()


def test_a_training_that_diverges_ends_though_errors_are_left_out(lm: CausalLM) -> None:
    hidden = uneven_stream(lm)
    hidden[:, 3] = torch.nan
    with pytest.raises(NonFiniteError):
        train_on(lm, stored(hidden), start="search", drop_largest=0.1)


def test_where_nothing_is_off_nothing_is_lost() -> None:
    target = torch.ones(2, 4, 8)
    assert distance_without_largest(target.clone(), target, "mse", 0.5) == 0
