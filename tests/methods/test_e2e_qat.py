"""E2E-QAT against a loop written by hand over the whole transformers model, and what it promises."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import msgspec
import pytest
import tiny
import torch
from by_hand import assert_same_but_for_few
from quiet import Heard
from torch import Tensor, nn
from torch.nn import functional

from engine.config.e2e_qat import E2EQATConfig
from engine.config.grid import Grid, GridConfig
from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.errors import NonFiniteError, StopRequested
from engine.methods.blockwise.rtn import round_to_nearest
from engine.methods.network.e2e_qat import _parameter_groups, train_weights
from engine.methods.network.network import Network, NetworkData, NetworkResult
from engine.methods.network.norms import trained_norms
from engine.methods.network.teacher import Teacher
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.quant.fake_linear import FakeQuantLinear, latent_linears, steps_of
from engine.quant.packed import PackedBlock, PackedWeight
from engine.quant.slots import slot, slots
from engine.training.snapshot import Snapshot

CPU = torch.device("cpu")
TRAIN, VAL, LENGTH = 8, 2, 16
GRID = GridConfig(bits=2, group_size=32)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes as long for a few values as for many."""
    if importlib.util.find_spec("triton"):
        from engine.quant import quant_step

        monkeypatch.setattr(quant_step, "HELD_VALUES", 1 << 14)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.build(tmp_path / "model", "llama2", num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture
def lm(folder: Path) -> CausalLM:
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)


def settings(**changes: Any) -> E2EQATConfig:
    config = E2EQATConfig(
        enabled=True,
        sequences=TRAIN,
        val_sequences=0,
        sequence_length=LENGTH,
        batch_size=4,
        micro_batch_size=2,
        epochs=3,
        loss="cross_entropy",
        lr_weight=0.2,
        lr_quant=0.02,
        warmup_fraction=0.2,
    )
    return msgspec.structs.replace(config, **changes)


def rounded(lm: CausalLM, grid: GridConfig = GRID) -> list[PackedBlock]:
    return [round_to_nearest(lm.load_block(i), lm.linear_names(i), grid) for i in range(lm.blocks)]


def originals(lm: CausalLM, index: int, packed: PackedBlock) -> dict[str, Tensor]:
    """A block's weights counted in grid steps."""
    return {
        place.name: steps_of(place.linear().weight.detach(), packed.linears[place.name].scale)
        for place in slots(lm.load_block(index), packed.linears)
    }


def data(lm: CausalLM, config: E2EQATConfig) -> NetworkData:
    ids = tiny.tokens(TRAIN + config.val_sequences, LENGTH, seed=3)
    if config.loss == "cross_entropy":
        return NetworkData(ids, TRAIN, None)
    hidden = lm.embed(ids)
    for index in range(lm.blocks):
        hidden = lm.run_block(lm.load_block(index), index, hidden)
    store = make_store("device", (*ids.shape, lm.hidden_size), torch.float32, CPU)
    store.write(0, hidden)
    return NetworkData(ids, TRAIN, Teacher(store))


class Trained:
    """All linears of a model before and after."""

    def __init__(self, lm: CausalLM, config: E2EQATConfig, grid: GridConfig = GRID, **options: Any) -> None:
        self.before = rounded(lm, grid)
        self.blocks = blocks = [lm.load_block(index) for index in range(lm.blocks)]
        latents = [
            originals(lm, index, packed) if config.start == "latents" else None
            for index, packed in enumerate(self.before)
        ]
        linears = [latent_linears(*of) for of in zip(blocks, self.before, latents, strict=True)]
        self.linears: dict[str, FakeQuantLinear] = {
            f"{index}.{name}": linear for index, named in enumerate(linears) for name, linear in named.items()
        }
        self.start = {name: linear.freeze() for name, linear in self.linears.items()}
        options = {"progress": Heard(), "recompute": False} | options
        self.result: NetworkResult = train_weights(
            lm, blocks, data(lm, config), config.resolved(grid), seed=5, dtype=torch.float32, **options
        )

    def packed(self) -> dict[str, PackedWeight]:
        return {name: linear.freeze() for name, linear in self.linears.items()}


class ByHand(nn.Module):
    """The same grid by plain operations, so that autograd derives its gradients."""

    def __init__(self, weight: PackedWeight, original: Tensor | None) -> None:
        """Started at the ``original`` weight, if given, else at the integers."""
        super().__init__()
        self.zero = weight.zero_point.float().unsqueeze(-1)
        self.scale = nn.Parameter(weight.scale.float())
        codes = weight.codes().float().reshape(*weight.scale.shape, -1)
        steps = codes - self.zero
        if original is not None:
            steps = original.reshape(codes.shape) / self.scale.detach().unsqueeze(-1)
            assert torch.equal((steps.round() + self.zero).clamp(0, 2**weight.bits - 1), codes)
        self.steps = nn.Parameter(steps)
        self.top = 2**weight.bits - 1

    def forward(self, x: Tensor) -> Tensor:
        rounded = self.steps + (self.steps.round() - self.steps).detach()
        q = (rounded + self.zero).clamp(0, self.top)
        return functional.linear(x, ((q - self.zero) * self.scale.unsqueeze(-1)).flatten(1))


FULL_QAT = {"start": "latents", "train": ("weights", "scales", "norms"), "lr_weight": 0.05}


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "cross_entropy"},
        {"loss": "kl"},
        FULL_QAT | {"loss": "kl"},
        FULL_QAT | {"loss": "cross_entropy", "lr_scaling": "absolute", "lr_quant": 1e-3, "grad_clip": 0.5},
    ],
    ids=["cross-entropy", "KL", "full QAT", "full QAT, absolute rates, clipped"],
)
def test_a_loop_written_by_hand_gives_the_same_weights_scales_and_norms(
    folder: Path, lm: CausalLM, changes: dict[str, Any]
) -> None:
    config = settings(**changes)
    ours = Trained(lm, config)
    stored = by_hand.whole_model(folder, {})

    def original(name: str) -> Tensor | None:
        index, _, inner = name.partition(".")
        place = slot(stored, f"model.layers.{index}.{inner}")
        return place.linear().weight.detach() if config.start == "latents" else None

    linears = {name: ByHand(weight, original(name)) for name, weight in ours.start.items()}
    model = by_hand.whole_model(folder, linears)
    norms = by_hand.norms(model) if "norms" in config.train else {}
    starts = {name: norm.detach().clone() for name, norm in norms.items()}
    groups: list[dict[str, Any]] = [{"params": [x.steps], "lr": config.lr_weight} for x in linears.values()]
    for values in [*(x.scale for x in linears.values()), *norms.values()]:
        unit = values.detach().abs().mean().item() if config.lr_scaling == "relative" else 1.0
        groups.append({"params": [values], "lr": config.lr_quant * unit})
    ids = tiny.tokens(TRAIN, LENGTH, seed=3)
    gradients = by_hand.train(model, folder, config, groups, ids, schedule="cosine")
    if config.grad_clip:
        assert max(gradients) > 1.05 * max(min(gradients), config.grad_clip), "clipping changes no step"
    for name, linear in linears.items():
        weight = ours.linears[name].weight.flatten()
        moved = (ours.packed()[name].codes() != ours.start[name].codes()).float().mean()
        assert moved > (0.001 if config.start == "latents" else -1), "no integer has moved"
        assert_same_but_for_few(weight, linear.steps.flatten(), 2e-3)
        assert_same_but_for_few(ours.linears[name].scale, linear.scale, 2e-5)
    found = [trained_norms(block) for block in ours.blocks]
    assert {f"{index}.{name}" for index, named in enumerate(found) for name in named} == set(norms)
    for name, norm in norms.items():
        index, _, inner = name.partition(".")
        assert (norm - starts[name]).abs().mean() > 1e-3, "tolerance is larger than what is trained"
        assert_same_but_for_few(found[int(index)][inner], norm, 2e-4)


def test_it_starts_as_the_very_model_that_was_packed(lm: CausalLM) -> None:
    before = rounded(lm)
    for index, packed in enumerate(before):
        linears = latent_linears(lm.load_block(index), packed)
        for name, linear in linears.items():
            again = linear.freeze()
            assert torch.equal(again.words, packed.linears[name].words)
            assert torch.equal(again.scale, packed.linears[name].scale)
            assert torch.equal(again.zero_point, packed.linears[name].zero_point)
            x = torch.randn(3, again.in_features)
            torch.testing.assert_close(linear(x), functional.linear(x, again.dequantize()))


@pytest.mark.parametrize("fixed", [None, 1, 2])
def test_groups_with_scales_below_zero_are_turned_around_but_where_zero_points_are_fixed(
    fixed: int | None,
) -> None:
    grid = Grid(2, 32, fixed_zero_point=fixed)
    codes = torch.randint(0, 4, (6, 64), dtype=torch.uint8)
    scale = torch.where(torch.arange(12).view(6, 2) % 3 == 0, -0.25, 0.5)
    zero = torch.randint(0, 4, (6, 2)) if fixed is None else torch.full((6, 2), fixed)
    weight = PackedWeight.from_codes(codes, scale, zero.float(), grid)
    for latent in (None, weight.codes().float() - zero.repeat_interleave(32, 1)):
        linear = FakeQuantLinear.of_packed(weight, latent=latent)
        linear.project()
        again = linear.freeze()
        assert torch.equal(again.dequantize(), weight.dequantize())
        if fixed is None:
            assert (again.scale > 0).all()
        else:
            assert (again.zero_point == fixed).all(), "formats write no zero points of such a grid"


def test_rates_follow_the_size_of_scales_on_whichever_side_of_zero(lm: CausalLM) -> None:
    linears = latent_linears(lm.load_block(0), rounded(lm)[0])
    config = settings(lr_scaling="relative")
    rates = [group.lr for group in _parameter_groups([], linears.values(), config)]
    with torch.no_grad():
        for linear in linears.values():
            linear.scale[::2].neg_()
    assert [group.lr for group in _parameter_groups([], linears.values(), config)] == rates


def test_integers_and_scales_move_and_zero_points_only_where_asked(lm: CausalLM) -> None:
    trained = Trained(lm, settings(lr_weight=0.5))
    moved = sum(
        int((weight.codes() != trained.start[name].codes()).sum())
        for name, weight in trained.packed().items()
    )
    assert moved > 0
    for name, weight in trained.packed().items():
        assert not torch.equal(weight.scale, trained.start[name].scale)
        assert torch.equal(weight.zero_point, trained.start[name].zero_point)
        assert weight.codes().max() <= 3
    with_zero_points = Trained(
        lm, settings(train=("weights", "zero_points"), lr_weight=1.0, lr_quant=0.6)
    ).packed()
    assert any(
        not torch.equal(w.zero_point, trained.start[n].zero_point) for n, w in with_zero_points.items()
    )
    assert all(w.zero_point.max() <= 3 for w in with_zero_points.values())


def test_a_scale_that_moves_changes_no_integer(lm: CausalLM) -> None:
    for name, weight in (trained := Trained(lm, settings(train=("scales",), lr_quant=0.1))).packed().items():
        assert torch.equal(weight.words, trained.start[name].words)
        assert not torch.equal(weight.scale, trained.start[name].scale)


@pytest.mark.parametrize("option", ["recompute", "micro_batch"])
def test_memory_is_saved_without_other_numbers(lm: CausalLM, option: str) -> None:
    one = Trained(lm, settings(micro_batch_size=4))
    if option == "recompute":
        other = Trained(lm, settings(micro_batch_size=4), recompute=True)
    else:
        other = Trained(lm, settings(micro_batch_size=1))
    for name, linear in one.linears.items():
        assert_same_but_for_few(linear.weight.flatten(), other.linears[name].weight.flatten(), 2e-3)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("micro_batch", [4, 3])
def test_the_fast_form_takes_the_steps_of_the_plain_one(lm: CausalLM, micro_batch: int) -> None:
    """One kernel a linear, by Triton's interpreter; with 3, micro-batches are of two sizes."""
    config = settings(batch_size=4, micro_batch_size=micro_batch, loss="kl", val_sequences=VAL, epochs=2)
    config = msgspec.structs.replace(config, train=("weights", "scales", "norms"))
    plain, fast = Trained(lm, config), Trained(lm, config, fast=True)
    assert fast.result.val_loss == pytest.approx(plain.result.val_loss, rel=1e-3)
    for name, linear in plain.linears.items():
        assert fast.linears[name].quantized is None, "the memory is given back"
        assert_same_but_for_few(fast.linears[name].weight.flatten(), linear.weight.flatten(), 2e-3)
        assert_same_but_for_few(fast.linears[name].scale, linear.scale, 2e-5)
    for one, other in zip(plain.blocks, fast.blocks, strict=True):
        norms = trained_norms(other)
        assert len(norms) == 2
        for name, norm in trained_norms(one).items():
            torch.testing.assert_close(norms[name], norm, rtol=1e-3, atol=2e-3)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("fast", [False, True])
def test_out_of_memory_again_and_again_it_takes_the_same_steps(
    lm: CausalLM, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First activations are recomputed, then half as many sequences pass at a time, in the middle of a batch
    too; no gradient of an attempt that failed is left over."""
    config = settings(batch_size=4, micro_batch_size=4)
    whole = Trained(lm, config)
    plain_step, calls = Network.micro_step, [0]

    def short(network: Network, rows: Tensor, *rest: Any) -> Tensor:
        calls[0] += 1
        if calls[0] in (2, 4, 6, 9) and (len(rows) > 1 or not network.recompute):
            raise torch.OutOfMemoryError
        return plain_step(network, rows, *rest)

    monkeypatch.setattr(Network, "micro_step", short)
    heard = Heard()
    tight = Trained(lm, config, fast=fast, progress=heard)
    assert [code for code, _ in heard.warnings] == ["memory", "micro_batch", "micro_batch"]
    for name, linear in whole.linears.items():
        assert_same_but_for_few(tight.linears[name].weight.flatten(), linear.weight.flatten(), 2e-3)
        assert_same_but_for_few(tight.linears[name].scale, linear.scale, 2e-5)


def test_fixed_zero_points_stay_and_leave_what_is_trained(lm: CausalLM) -> None:
    grid = GridConfig(bits=2, group_size=32, zero_point="fixed")
    config = settings(train=("weights", "scales", "zero_points"))
    assert config.resolved(grid).train == ("weights", "scales")
    for weight in Trained(lm, config, grid).packed().values():
        assert weight.zero_point.unique().tolist() == [1]


def test_the_best_validated_state_is_kept(lm: CausalLM) -> None:
    trained = Trained(lm, settings(loss="kl", val_sequences=VAL, lr_weight=50.0, lr_quant=5.0))
    for name, weight in trained.packed().items():
        assert torch.equal(weight.words, trained.start[name].words)
        assert torch.equal(weight.scale, trained.start[name].scale)


def test_training_lowers_the_divergence_it_trains_on(lm: CausalLM) -> None:
    result = Trained(lm, settings(loss="kl", val_sequences=VAL, epochs=12, lr_weight=0.05)).result
    assert result.initial_loss is not None
    assert result.val_loss is not None
    assert result.val_loss < result.initial_loss


def test_divergence_names_the_phase(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned = lambda *_: NetworkData(  # noqa: E731
        tiny.tokens(TRAIN, LENGTH, seed=3), TRAIN, Teacher(store)
    )
    store = make_store("device", (TRAIN, LENGTH, lm.hidden_size), torch.float32, CPU)
    store.write(0, torch.full((TRAIN, LENGTH, lm.hidden_size), torch.nan))
    monkeypatch.setitem(globals(), "data", poisoned)
    with pytest.raises(NonFiniteError, match="e2e_qat"):
        Trained(lm, settings(loss="kl"), progress=Heard(due=True))


class Interrupter(Heard):
    """Takes the state at one boundary, through what a file can hold, and ends the training there."""

    def __init__(self, stop_at: int) -> None:
        super().__init__()
        self.at, self.seen = stop_at, 0
        self.left: Snapshot | None = None

    def step_boundary(self, state: Callable[[], Snapshot]) -> None:
        self.seen += 1
        if self.seen == self.at:
            tensors, facts = state()
            self.left = Snapshot(
                {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(facts))
            )
            raise StopRequested


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_training_that_was_interrupted_ends_with_the_same_bits(lm: CausalLM, stop_at: int) -> None:
    config = settings(loss="kl", val_sequences=VAL)
    whole = Trained(lm, config).packed()
    keeper = Interrupter(stop_at)
    with pytest.raises(StopRequested):
        Trained(lm, config, keeper=keeper)
    assert keeper.left is not None
    continued = Trained(lm, config, snapshot=keeper.left).packed()
    for name, weight in whole.items():
        assert torch.equal(continued[name].words, weight.words)
        assert torch.equal(continued[name].scale, weight.scale)
