"""Block-AP that trains only which way weights are rounded, or only by how much ranges are narrowed, against
loops written by hand from the formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import tiny
import torch
from quiet import Heard, one_block
from torch import Tensor, nn
from torch.nn import functional

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.config.loading import load
from engine.config.model import ModelConfig
from engine.config.validation import validate
from engine.data.activations import make_store
from engine.data.sampler import BatchSampler
from engine.errors import UsageError
from engine.methods.blockwise.reconstruction import Streams
from engine.methods.blockwise.rtn import round_to_nearest
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.plan.plan import make_plan
from engine.quant.fake_linear import FakeQuantLinear
from engine.quant.grid import initial_range
from engine.quant.packed import PackedBlock
from engine.quant.slots import slots
from engine.training.schedule import cosine_factor

CPU = torch.device("cpu")
TRAIN, LENGTH, RATE = 8, 16, 2e-3


@pytest.fixture
def lm(tmp_path: Path) -> CausalLM:
    folder = tiny.build(tmp_path / "model", "llama2", num_hidden_layers=1)
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)


def trained(lm: CausalLM, grid: GridConfig, *what: str, epochs: int = 4) -> PackedBlock:
    """The block, with only ``what`` trained."""
    config = BlockAPConfig(
        train=what,  # type: ignore[arg-type]
        sequences=TRAIN,
        val_sequences=0,
        sequence_length=LENGTH,
        batch_size=2,
        epochs=epochs,
        loss="mse",
        lr_scaling="absolute",
        lr_weight=RATE,
        lr_quant=RATE,
    )
    ids = tiny.tokens(TRAIN, LENGTH)
    stores = [make_store("device", (*ids.shape, lm.hidden_size), torch.float32, CPU) for _ in range(2)]
    for store in stores:
        store.write(0, lm.embed(ids))
    streams = Streams(*stores, TRAIN)
    return one_block(lm, 0, streams, config, grid, seed=0, dtype=torch.float32, progress=Heard()).packed


def ste(value: Tensor, result: Tensor) -> Tensor:
    return value + (result - value).detach()


class ByHand(nn.Module):
    """Out of elementary operations; autograd derives the gradients. ``V`` of rounding is counted in the
    weight's own units, as its learning rate is."""

    def __init__(self, linear: nn.Linear, grid: GridConfig, what: tuple[str, ...]) -> None:
        super().__init__()
        self.top, self.group = 2**grid.bits - 1, grid.group_size
        self.weight = linear.weight.detach().clone()
        scale, zero = initial_range(self.weight, grid.shared, method=grid.range)
        grouped = self.weight.reshape(*scale.shape, -1)
        self.least, self.most = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        self.trains = []
        if "rounding" in what:
            self.v = nn.Parameter(torch.zeros_like(self.weight))
            self.trains.append(self.v)
        if "clipping" in what:
            self.low = nn.Parameter(torch.maximum(-zero * scale, self.least))
            self.high = nn.Parameter(torch.minimum((self.top - zero) * scale, self.most))
            self.trains += [self.low, self.high]
        else:
            self.scale, self.zero = nn.Parameter(scale), nn.Parameter(zero)
            if "scales" in what:
                self.trains += [self.scale, self.zero]
        self.what = what

    def range(self) -> tuple[Tensor, Tensor]:
        if "clipping" not in self.what:
            return self.scale, self.zero
        scale = (self.high - self.low) / self.top
        return scale, -self.low / scale

    def quantized(self, *, stored: bool = False) -> Tensor:
        scale, zero = self.range()
        scale = scale.half().float() if stored else scale
        s = scale.repeat_interleave(self.group, 1)
        zero = ste(zero, zero.round()).clamp(0, self.top).repeat_interleave(self.group, 1)
        ratio = (self.weight + self.v if "rounding" in self.what else self.weight) / s
        return ((ste(ratio, ratio.round()) + zero).clamp(0, self.top) - zero) * s

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.quantized())

    @torch.no_grad()
    def project(self) -> None:
        if "clipping" in self.what:
            self.low.copy_(torch.minimum(torch.maximum(self.low, self.least), torch.zeros(())))
            self.high.copy_(torch.maximum(torch.minimum(self.high, self.most), torch.zeros(())))
        else:
            self.zero.clamp_(0, self.top)
        if "rounding" in self.what:
            half = self.range()[0].repeat_interleave(self.group, 1) / 2
            self.v.copy_(torch.minimum(torch.maximum(self.v, -half), half))


def by_hand(lm: CausalLM, grid: GridConfig, what: tuple[str, ...], epochs: int = 4) -> dict[str, Tensor]:
    hidden = lm.embed(tiny.tokens(TRAIN, LENGTH))
    block = lm.load_block(0)
    target = lm.run_block(block, 0, hidden)
    linears = {}
    for slot in slots(block, lm.linear_names(0)):
        linears[slot.name] = ByHand(slot.linear(), grid, what)
        slot.set(linears[slot.name])
    parameters = [one for linear in linears.values() for one in linear.trains]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0, fused=False)
    sampler, done = BatchSampler(TRAIN, 2, epochs, seed=0), 0
    for epoch in range(epochs):
        for rows in sampler.order(epoch).split(2):
            optimizer.param_groups[0]["lr"] = RATE * cosine_factor(done, epochs * TRAIN // 2, 0.05)
            loss = functional.mse_loss(lm.run_block(block, 0, hidden[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            for linear in linears.values():
                linear.project()
    with torch.no_grad():
        return {name: linear.quantized(stored=True) for name, linear in linears.items()}


SETS = [("rounding",), ("clipping",), ("rounding", "clipping"), ("rounding", "scales", "zero_points")]


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("what", SETS, ids="+".join)
def test_a_part_trained_by_a_hand_written_loop_gives_the_same_numbers(
    lm: CausalLM, what: tuple[str, ...], bits: int
) -> None:
    grid = GridConfig(bits=bits, group_size=32, range="minmax")
    ours, expected = trained(lm, grid, *what), by_hand(lm, grid, what)
    start = round_to_nearest(lm.load_block(0), lm.linear_names(0), grid)
    moved = 0
    for name, weight in ours.linears.items():
        found = weight.dequantize()
        # A weight that sits on a rounding border may fall to either side; nearly none do.
        off = ((found - expected[name]).abs() > 1e-4).float().mean().item()
        assert off < 0.005, f"{name}: {off:.2%} of the weights differ"
        moved += int((found != start.linears[name].dequantize()).sum())
    assert moved > 50


@pytest.mark.parametrize(("bits", "zero_point"), [(2, "learned"), (4, "learned"), (2, "fixed")])
def test_of_rounding_each_weight_goes_up_or_down_and_the_grid_stays(
    lm: CausalLM, bits: int, zero_point: Literal["learned", "fixed"]
) -> None:
    grid = GridConfig(bits=bits, group_size=32, zero_point=zero_point)
    start = round_to_nearest(lm.load_block(0), lm.linear_names(0), grid)
    original = {slot.name: slot.linear().weight for slot in slots(lm.load_block(0), lm.linear_names(0))}
    packed = trained(lm, grid, "rounding", epochs=40)
    turned = 0
    for name, weight in packed.linears.items():
        before = start.linears[name]
        assert torch.equal(weight.scale, before.scale)
        assert torch.equal(weight.zero_point, before.zero_point)
        scale = before.scale.float().repeat_interleave(32, 1)
        zero = before.zero_point.float().repeat_interleave(32, 1)
        exact = original[name] / scale + zero
        top = 2**bits - 1
        codes = weight.codes().float()
        # float16 scales choose the integers, whose half steps were measured in float32 ones.
        slack = 1e-2
        lower = torch.floor(exact - slack).clamp(0, top)
        upper = torch.ceil(exact + slack).clamp(0, top)
        assert bool(((codes >= lower) & (codes <= upper)).all()), name
        turned += int((codes != before.codes().float()).sum())
    assert turned > 100


def test_of_clipping_no_range_grows_beyond_its_weights(lm: CausalLM) -> None:
    grid = GridConfig(bits=3, group_size=32, range="minmax")
    packed = trained(lm, grid, "clipping", epochs=40)
    narrower = 0
    for slot in slots(lm.load_block(0), lm.linear_names(0)):
        weight = packed.linears[slot.name]
        grouped = slot.linear().weight.detach().reshape(*weight.scale.shape, -1)
        width = grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)
        ours = weight.scale.float() * 7
        assert bool((ours <= width * 1.002).all())
        narrower += int((ours < width * 0.99).sum())
    assert narrower > 20


def test_what_is_projected_twice_is_what_is_projected_once() -> None:
    torch.manual_seed(0)
    grid = GridConfig(bits=2, group_size=32).shared
    linear = FakeQuantLinear.of_linear(nn.Linear(64, 8, bias=False), grid)
    started = linear.weight.detach().clone()
    low, high = linear.only_clip()
    linear.only_round()
    with torch.no_grad():
        for parameter in (low, high, linear.weight):
            parameter.add_(torch.randn_like(parameter))
    linear.project()
    once = [one.detach().clone() for one in (low, high, linear.weight, linear.scale, linear.zero_point)]
    linear.project()
    for now, before in zip((low, high, linear.weight, linear.scale, linear.zero_point), once, strict=True):
        assert torch.equal(now, before)
    half = linear.scale.detach().repeat_interleave(32, 1) / 2
    assert bool(((linear.weight - started).abs() <= half * (1 + 1e-5)).all())
    assert bool((low <= 0).all())
    assert bool((high >= 0).all())


@pytest.mark.parametrize(
    ("train", "grid", "says"),
    [
        (["rounding", "weights"], {}, "block_ap.train: rounding is a part of training weights"),
        (["clipping", "scales"], {}, "block_ap.train: clipping is a part of training scales"),
        (["clipping", "zero_points"], {}, "block_ap.train: clipping is a part of training zero_points"),
        (["clipping"], {"grid.zero_point": "fixed"}, "clipping moves zero points, and this grid fixes them"),
        (["clipping"], {"grid.symmetric": True}, "clipping moves zero points, and this grid fixes them"),
    ],
)
def test_sets_that_mean_nothing_are_refused_in_one_line(
    train: list[str], grid: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        validate(load("smoke", overrides={"block_ap.train": train, **grid}))


def test_the_plan_counts_a_part_like_what_it_is_a_part_of_and_rounding_what_it_started_from(
    tmp_path: Path,
) -> None:
    def parts(*what: str) -> dict[str, int]:
        config = load("smoke", overrides={"block_ap.train": list(what), "runtime.device": "cpu"})
        phases = make_plan(config, runs_dir=tmp_path).to_dict()["phases"]
        found: dict[str, int] = next(phase["parts"] for phase in phases if phase["name"] == "block_ap")
        return found

    assert parts("clipping") == parts("scales", "zero_points")
    rounding, weights = parts("rounding"), parts("weights")
    linears = rounding["weights of a block"] - weights["weights of a block"]
    assert linears > 0.9 * weights["optimizer"] / 2 > 0  # float32, beside two moments of each
    assert {**rounding, "weights of a block": 0} == {**weights, "weights of a block": 0}
