"""Block-AP against a loop written by hand from the formulas, and what it promises when things go wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from quiet import Heard, one_block
from torch import Tensor, nn
from torch.nn import functional

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.data.sampler import BatchSampler
from engine.errors import ExitCode, NonFiniteError, StopRequested
from engine.methods.blockwise.reconstruction import Streams, distance
from engine.methods.blockwise.rtn import round_to_nearest
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.quant.grid import initial_range
from engine.quant.packed import PackedBlock
from engine.quant.slots import slots
from engine.training.schedule import cosine_factor
from engine.training.stepper import Diverged, ParameterGroup, Stepper

CPU = torch.device("cpu")
TRAIN, VAL, LENGTH = 6, 2, 16


@pytest.fixture
def lm(tmp_path: Path) -> CausalLM:
    folder = tiny.build(tmp_path / "model", "llama2", num_hidden_layers=2)
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)


def settings(**changes: object) -> BlockAPConfig:
    values: dict[str, object] = {
        "sequences": TRAIN,
        "val_sequences": VAL,
        "sequence_length": LENGTH,
        "batch_size": 2,
        "epochs": 2,
        "loss": "mse",
        "lr_scaling": "absolute",
        "lr_weight": 1e-3,
        "lr_quant": 1e-3,
    }
    return BlockAPConfig(**{**values, **changes})  # type: ignore[arg-type]


def make_streams(lm: CausalLM, train: int = TRAIN, val: int = VAL, seed: int = 0) -> Streams:
    ids = tiny.tokens(train + val, LENGTH, seed=seed)
    stores = [make_store("device", (*ids.shape, lm.hidden_size), torch.float32, CPU) for _ in range(2)]
    for store in stores:
        store.write(0, lm.embed(ids))
    return Streams(*stores, train)


def quantize_all(
    lm: CausalLM, streams: Streams, config: BlockAPConfig, grid: GridConfig, progress: Heard | None = None
) -> list[PackedBlock]:
    return [
        one_block(
            lm, i, streams, config, grid, seed=i, dtype=torch.float32, progress=progress or Heard()
        ).packed
        for i in range(lm.blocks)
    ]


# -- the same by hand ----------------------------------------------------------------------------------


def ste(value: Tensor, result: Tensor) -> Tensor:
    return value + (result - value).detach()


class HandLinear(nn.Module):
    """Fake quantization out of elementary operations; autograd derives the gradients."""

    def __init__(self, linear: nn.Linear, grid: GridConfig) -> None:
        super().__init__()
        self.top, self.group = 2**grid.bits - 1, grid.group_size
        self.weight = nn.Parameter(linear.weight.detach().clone())
        scale, zero = initial_range(self.weight.data, grid.shared, method=grid.range)
        self.scale, self.zero = nn.Parameter(scale), nn.Parameter(zero)
        self.floor = scale * 1e-2

    def quantized(self) -> Tensor:
        s = self.scale.repeat_interleave(self.group, 1)
        zero = ste(self.zero, self.zero.round()).clamp(0, self.top).repeat_interleave(self.group, 1)
        ratio = self.weight / s
        return ((ste(ratio, ratio.round()) + zero).clamp(0, self.top) - zero) * s

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.quantized())


def block_ap_by_hand(lm: CausalLM, config: BlockAPConfig, grid: GridConfig) -> list[dict[str, Tensor]]:
    ids = tiny.tokens(TRAIN + VAL, LENGTH)
    full = quantized = lm.embed(ids)
    frozen: list[dict[str, Tensor]] = []
    for index in range(lm.blocks):
        block = lm.load_block(index)
        target = lm.run_block(block, index, full)
        linears = {}
        for slot in slots(block, lm.linear_names(index)):
            linears[slot.name] = HandLinear(slot.linear(), grid)
            slot.set(linears[slot.name])
        norms = [p.requires_grad_(True) for n, p in block.named_parameters() if "norm" in n]
        weights = [x.weight for x in linears.values()] + norms
        others = [p for x in linears.values() for p in (x.scale, x.zero)]
        optimizer = torch.optim.AdamW(
            [{"params": weights, "lr": config.lr_weight}, {"params": others, "lr": config.lr_quant}],
            weight_decay=0,
            fused=False,
        )
        steps, done = config.epochs * -(-TRAIN // config.batch_size), 0
        best, best_loss = None, float("inf")

        def validate(
            block: nn.Module = block, index: int = index, x: Tensor = quantized, y: Tensor = target
        ) -> float:
            with torch.no_grad():
                return functional.mse_loss(lm.run_block(block, index, x[TRAIN:]), y[TRAIN:]).item()

        for epoch in range(config.epochs + 1):
            if epoch:
                order = BatchSampler(TRAIN, config.batch_size, config.epochs, seed=index).order(epoch - 1)
                for rows in order.split(config.batch_size):
                    factor = cosine_factor(done, steps, config.lr_final_fraction)
                    optimizer.param_groups[0]["lr"] = config.lr_weight * factor
                    optimizer.param_groups[1]["lr"] = config.lr_quant * factor
                    loss = functional.mse_loss(lm.run_block(block, index, quantized[rows]), target[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    done += 1
                    with torch.no_grad():
                        for x in linears.values():
                            x.scale.copy_(torch.maximum(x.scale, x.floor))
                            x.zero.clamp_(0, x.top)
            value = validate()
            if value < best_loss:
                best, best_loss = [p.detach().clone() for p in (*weights, *others)], value
        assert best is not None
        with torch.no_grad():
            for parameter, value in zip((*weights, *others), best, strict=True):
                parameter.copy_(value)
            state = {}
            for name, x in linears.items():
                x.scale.copy_(x.scale.half().float())
                state[f"{name}.weight"] = x.quantized()
            for name, p in block.named_parameters():
                if "norm" in name:
                    p.copy_(p.half().float())
                    state[name] = p.detach().clone()
            full, quantized = target, lm.run_block(block, index, quantized)
        frozen.append(state)
    return frozen


@pytest.mark.parametrize("bits", [2, 3])
def test_two_blocks_trained_by_a_hand_written_loop_give_the_same_numbers(lm: CausalLM, bits: int) -> None:
    config, grid = settings(), GridConfig(bits=bits, group_size=32, range="minmax")
    ours = quantize_all(lm, make_streams(lm), config, grid)
    by_hand = block_ap_by_hand(lm, config, grid)
    for packed, expected in zip(ours, by_hand, strict=True):
        for name, weight in packed.linears.items():
            wanted = expected[f"{name}.weight"]
            # A weight that sits on a rounding border may fall to either side; nearly none do.
            off = ((weight.dequantize() - wanted).abs() > 1e-4).float().mean().item()
            assert off < 0.002, f"{name}: {off:.2%} of the weights differ"
        for name, tensor in packed.others.items():
            torch.testing.assert_close(tensor.float(), expected[name], rtol=2e-3, atol=2e-3)
    moved = round_to_nearest(lm.load_block(0), lm.linear_names(0), grid)
    assert any(not torch.equal(moved.linears[n].words, ours[0].linears[n].words) for n in moved.linears)


# -- what training does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "token_relative_mse"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_training_reduces_the_reconstruction_loss(
    lm: CausalLM, loss: str, symmetric: bool, bits: int
) -> None:
    grid = GridConfig(bits=bits, group_size=32, symmetric=symmetric)
    config = settings(loss=loss, epochs=8, val_sequences=0, sequences=16)
    streams = make_streams(lm, train=16, val=0)
    result = one_block(lm, 0, streams, config, grid, seed=0, dtype=torch.float32, progress=Heard())
    assert result.final_loss < 0.95 * result.initial_loss
    # The quantized stream has advanced by the frozen block, the full one by the original.
    block = result.packed.install(lm.load_block(0))
    expected = lm.run_block(block, 0, lm.embed(tiny.tokens(16, LENGTH)))
    torch.testing.assert_close(streams.quantized.read(slice(0, 16)), expected, rtol=1e-4, atol=1e-4)
    original = lm.run_block(lm.load_block(0), 0, lm.embed(tiny.tokens(16, LENGTH)))
    torch.testing.assert_close(streams.full.read(slice(0, 16)), original, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "fixed"), [(2, 1), (3, 4), (4, 8), (8, 128)])
def test_a_fixed_zero_point_is_the_same_everywhere_after_training(
    lm: CausalLM, bits: int, fixed: int
) -> None:
    grid = GridConfig(bits=bits, group_size=32, zero_point="fixed")
    # A configuration made in Python that asks for zero points: the grid's say is the last.
    config = settings(train=("weights", "scales", "zero_points", "norms"), val_sequences=0)
    start = round_to_nearest(lm.load_block(0), lm.linear_names(0), grid)
    streams = make_streams(lm, val=0)
    result = one_block(lm, 0, streams, config, grid, seed=0, dtype=torch.float32, progress=Heard())
    for packed in (start, result.packed):
        for name, weight in packed.linears.items():
            assert weight.zero_point.unique().tolist() == [fixed], name
            assert set(weight.scale.sign().unique().tolist()) == {-1.0, 1.0}, "groups turn round"
    assert SWITCHES["weights"](start, result.packed)
    assert SWITCHES["scales"](start, result.packed)


SWITCHES: dict[str, Callable[[PackedBlock, PackedBlock], bool]] = {
    "weights": lambda a, b: any(not torch.equal(a.linears[n].words, b.linears[n].words) for n in a.linears),
    "scales": lambda a, b: any(not torch.equal(a.linears[n].scale, b.linears[n].scale) for n in a.linears),
    "zero_points": lambda a, b: any(
        not torch.equal(a.linears[n].zero_point, b.linears[n].zero_point) for n in a.linears
    ),
    "norms": lambda a, b: any(not torch.equal(a.others[n], b.others[n]) for n in a.others if "norm" in n),
}


@pytest.mark.parametrize("trained", list(SWITCHES))
def test_only_what_is_switched_on_is_trained(lm: CausalLM, trained: str) -> None:
    grid = GridConfig(bits=3, group_size=32)
    config = settings(
        train=(trained,), val_sequences=0, lr_weight=0.01, lr_quant=0.2 if "zero" in trained else 0.01
    )
    start = round_to_nearest(lm.load_block(0), lm.linear_names(0), grid)
    result = one_block(
        lm, 0, make_streams(lm, val=0), config, grid, seed=0, dtype=torch.float32, progress=Heard()
    )
    assert SWITCHES[trained](start, result.packed), f"{trained} did not move"
    for name in ("scales", "zero_points", "norms"):
        if name != trained:
            assert not SWITCHES[name](start, result.packed), f"{name} moved while only {trained} was trained"
    assert result.val_loss is None


def test_best_validated_state_is_kept_when_training_makes_it_worse(lm: CausalLM) -> None:
    grid = GridConfig(bits=4, group_size=32)
    start = round_to_nearest(lm.load_block(0), lm.linear_names(0), grid)
    ruinous = settings(lr_weight=5.0, lr_quant=1.0)
    result = one_block(lm, 0, make_streams(lm), ruinous, grid, seed=0, dtype=torch.float32, progress=Heard())
    for name, weight in start.linears.items():
        assert torch.equal(result.packed.linears[name].words, weight.words)
    assert result.final_loss == pytest.approx(result.initial_loss)


def test_early_stopping_ends_a_block_that_no_longer_improves(lm: CausalLM) -> None:
    grid = GridConfig(bits=4, group_size=32)
    ruinous = settings(lr_weight=5.0, lr_quant=1.0, epochs=9, patience=2)
    result = one_block(lm, 0, make_streams(lm), ruinous, grid, seed=0, dtype=torch.float32, progress=Heard())
    assert result.steps == 2 * 3


def test_relative_distance_is_not_ruled_by_one_huge_token() -> None:
    target = torch.ones(1, 8, 4)
    target[:, 0] = 3000
    output = target.clone()
    output[:, 0] += 30
    output[:, 1:] += 1
    assert distance(output, target, "mse").item() == pytest.approx((900 + 7) / 8)
    assert distance(output, target, "token_relative_mse").item() == pytest.approx((1e-4 + 7) / 8)


# -- when things go wrong ------------------------------------------------------------------------------


class Poison:
    """A stream that yields NaN for the first ``count`` reads of training batches."""

    def __init__(self, store: object, count: int) -> None:
        self.store, self.count = store, count

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    def read_into(self, rows: Tensor | range, target: Tensor) -> None:
        self.store.read_into(rows, target)  # type: ignore[attr-defined]
        if isinstance(rows, Tensor) and self.count > 0:
            self.count -= 1
            target.fill_(torch.nan)


def poisoned(lm: CausalLM, count: int) -> Streams:
    streams = make_streams(lm)
    return Streams(streams.full, Poison(streams.quantized, count), streams.train)  # type: ignore[arg-type]


def test_one_non_finite_step_is_not_applied_and_training_goes_on(lm: CausalLM) -> None:
    grid, heard = GridConfig(bits=3, group_size=32), Heard(due=True)
    result = one_block(lm, 0, poisoned(lm, 2), settings(), grid, seed=0, dtype=torch.float32, progress=heard)
    assert not heard.warnings
    assert all(torch.isfinite(w.scale).all() for w in result.packed.linears.values())
    assert result.final_loss < result.initial_loss


def test_three_non_finite_steps_in_a_row_start_the_block_again_at_half_the_rate(lm: CausalLM) -> None:
    grid, heard = GridConfig(bits=3, group_size=32), Heard(due=True)
    result = one_block(lm, 0, poisoned(lm, 3), settings(), grid, seed=0, dtype=torch.float32, progress=heard)
    assert [code for code, _ in heard.warnings] == ["rollback"]
    assert "0.5 of the learning rate" in heard.warnings[0][1]
    rates = [m["lr"]["scales"] for m in heard.metrics if m.get("lr")]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates[2:]) == pytest.approx(0.5e-3)
    assert result.final_loss < result.initial_loss


def test_endless_divergence_ends_with_exit_code_5_naming_block_and_step(lm: CausalLM) -> None:
    heard = Heard(due=True)
    with pytest.raises(NonFiniteError) as caught:
        one_block(
            lm,
            1,
            poisoned(lm, 10_000),
            settings(),
            GridConfig(bits=3, group_size=32),
            seed=0,
            dtype=torch.float32,
            progress=heard,
        )
    assert caught.value.exit_code == ExitCode.NON_FINITE == 5
    assert caught.value.where == "block 1"
    assert "step 2" in caught.value.message
    assert len(heard.warnings) == 2


def test_a_skipped_step_leaves_parameters_and_moments_untouched() -> None:
    parameter = nn.Parameter(torch.ones(4))
    stepper = Stepper(
        [ParameterGroup("weights", [parameter], 0.1)],
        weight_decay=0,
        grad_clip=0,
        device=CPU,
        dtype=torch.float32,
    )
    for factor in (1.0, float("nan"), 1.0):
        loss = (parameter * factor).sum()
        loss.backward()
        before = parameter.detach().clone()
        stepper.step(loss)
        assert torch.equal(before, parameter) == (factor != factor)
    assert stepper.optimizer.state[parameter]["step"].item() == 2


def test_float16_gradients_that_stay_non_finite_count_once_the_scale_cannot_fall_further() -> None:
    parameter = nn.Parameter(torch.ones(4))
    stepper = Stepper(
        [ParameterGroup("weights", [parameter], 0.1)],
        weight_decay=0,
        grad_clip=0,
        device=CPU,
        dtype=torch.float16,
    )

    def step_number(step: int) -> None:
        # The loss is finite, its gradient is not: infinity less infinity in the chain rule at a root of 0.
        loss = (parameter - parameter).sqrt().sum() + 1.0
        stepper.scale(loss).backward()
        stepper.step(loss)
        stepper.check(step)

    step = 0
    try:
        for step in range(60):
            step_number(step)
    except Diverged:
        pass
    else:
        pytest.fail("60 steps without a finite gradient went unnoticed")
    assert step > 10, "overflow while the scale settles is no divergence"
    assert torch.equal(parameter, torch.ones(4))


def test_a_stop_is_heard_at_a_step_boundary(lm: CausalLM) -> None:
    heard = Heard(stop_at=2)
    with pytest.raises(StopRequested):
        quantize_all(lm, make_streams(lm), settings(), GridConfig(bits=4, group_size=32), heard)
    assert heard.boundaries == 2


def test_losses_gradient_norms_and_learning_rates_are_reported(lm: CausalLM) -> None:
    heard = Heard(due=True)
    quantize_all(lm, make_streams(lm), settings(), GridConfig(bits=4, group_size=32), heard)
    steps = [m for m in heard.metrics if "grad_norm" in m]
    assert len(steps) == 2 * 2 * 3
    assert all(m["loss"] > 0 and m["grad_norm"] > 0 for m in steps)
    assert set(steps[0]["lr"]) == {"weights", "scales", "zero_points", "norms"}
    assert steps[0]["lr"]["weights"] == pytest.approx(1e-3)
    assert steps[5]["lr"]["weights"] < 0.3e-3
    assert sum(m.get("val_loss") is not None for m in heard.metrics) == 4
