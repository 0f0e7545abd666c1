"""LR-QAT against a loop written by hand over the whole transformers model, and what it promises."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

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
from engine.config.grid import GridConfig
from engine.config.latents import Downcast
from engine.config.lr_qat import LRQATConfig
from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.errors import StopRequested
from engine.methods.blockwise.rtn import round_to_nearest
from engine.methods.network.e2e_qat import train_weights
from engine.methods.network.lr_qat import low_rank_linears, train_factors
from engine.methods.network.network import Network, NetworkData, NetworkResult
from engine.methods.network.norms import norm_groups, norms_of, trained_norms
from engine.methods.network.teacher import Teacher
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.quant.downcast import upcast
from engine.quant.fake_linear import latent_linears, steps_of
from engine.quant.low_rank import LowRankLinear
from engine.quant.packed import PackedBlock, PackedWeight
from engine.quant.slots import slot, slots
from engine.training.schedule import rate_factor
from engine.training.snapshot import Snapshot

CPU = torch.device("cpu")
TRAIN, VAL, LENGTH = 8, 2, 16
GRID = GridConfig(bits=3, group_size=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.build(tmp_path / "model", "llama2", num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture
def lm(folder: Path) -> CausalLM:
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)


def settings(**changes: Any) -> LRQATConfig:
    config = LRQATConfig(
        enabled=True,
        rank=4,
        sequences=TRAIN,
        val_sequences=0,
        sequence_length=LENGTH,
        batch_size=4,
        micro_batch_size=2,
        epochs=3,
        loss="cross_entropy",
        lr_factors=0.05,
        lr_quant=0.02,
        grad_clip=0.0,
        warmup_fraction=0.2,
    )
    return msgspec.structs.replace(config, **changes)


def rounded(lm: CausalLM, grid: GridConfig = GRID) -> list[PackedBlock]:
    return [round_to_nearest(lm.load_block(i), lm.linear_names(i), grid) for i in range(lm.blocks)]


def originals(lm: CausalLM, index: int, packed: PackedBlock) -> dict[str, Tensor]:
    return {
        place.name: steps_of(place.linear().weight.detach(), packed.linears[place.name].scale)
        for place in slots(lm.load_block(index), packed.linears)
    }


def data(lm: CausalLM, config: LRQATConfig | E2EQATConfig) -> NetworkData:
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

    def __init__(self, lm: CausalLM, config: LRQATConfig, grid: GridConfig = GRID, **options: Any) -> None:
        self.linears: dict[str, LowRankLinear] = {}
        self.blocks: list[nn.Module] = []
        for index, packed in enumerate(rounded(lm, grid)):
            block = lm.load_block(index)
            named = latent_linears(block, packed, originals(lm, index, packed))
            for name, linear in low_rank_linears(block, named, config, 7 + index).items():
                self.linears[f"{index}.{name}"] = linear
            self.blocks.append(block)
        self.start = {name: linear.freeze() for name, linear in self.linears.items()}
        self.factors = {
            name: (x.a.detach().clone(), x.b.detach().clone()) for name, x in self.linears.items()
        }
        options = {"progress": Heard(), "recompute": False} | options
        self.result: NetworkResult = train_factors(
            lm, self.blocks, data(lm, config), config.resolved(grid), seed=5, dtype=torch.float32, **options
        )

    def packed(self) -> dict[str, PackedWeight]:
        return {name: linear.freeze() for name, linear in self.linears.items()}


class ByHand(nn.Module):
    """The same by plain operations, so that autograd derives its gradients."""

    def __init__(self, linear: LowRankLinear, a: Tensor, b: Tensor, start: PackedWeight) -> None:
        super().__init__()
        self.latent = upcast(linear.kept, linear.origin, linear.grid)
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.scale = nn.Parameter(start.scale.float())
        self.zero = start.zero_point.float().unsqueeze(-1)
        self.ratio, self.top = linear.how.ratio, 2**start.bits - 1

    def forward(self, x: Tensor) -> Tensor:
        steps = self.latent + self.ratio * (self.a @ self.b)
        rounded = (steps + (steps.round() - steps).detach()).reshape(*self.scale.shape, -1)
        q = (rounded + self.zero).clamp(0, self.top)
        return functional.linear(x, ((q - self.zero) * self.scale.unsqueeze(-1)).flatten(1))


PAPER = {
    "loss": "cross_entropy",
    "lr_scaling": "absolute",
    "lr_factors": 0.05,
    "lr_quant": 1e-3,
    "grad_clip": 1.0,
    "warmup_fraction": 0.1,
}
"""As published, but for rates at which six steps go somewhere."""


@pytest.mark.parametrize(
    "changes", [{"loss": "kl"}, PAPER, PAPER | {"zero_factor": "b"}], ids=["ours", "published", "b at zero"]
)
def test_a_loop_written_by_hand_gives_the_same_factors_and_scales(
    folder: Path, lm: CausalLM, changes: dict[str, Any]
) -> None:
    config = settings(schedule="linear", **changes)
    ours = Trained(lm, config)
    linears = {n: ByHand(x, *ours.factors[n], ours.start[n]) for n, x in ours.linears.items()}
    relative = config.lr_scaling == "relative"
    groups: list[dict[str, Any]] = [{"params": [x.a, x.b], "lr": 0.05} for x in linears.values()]
    for x in linears.values():
        lr = config.lr_quant * x.scale.mean().item() if relative else config.lr_quant
        groups.append({"params": [x.scale], "lr": lr})
    model = by_hand.whole_model(folder, linears)
    ids = tiny.tokens(TRAIN, LENGTH, seed=3)
    norms = by_hand.train(model, folder, config, groups, ids, schedule="linear")
    if config.grad_clip:
        assert max(norms) > 1.05 * max(min(norms), config.grad_clip), "clipping changes no step"
    for name, linear in linears.items():
        pairs = (ours.linears[name].a, linear.a), (ours.linears[name].b, linear.b)
        for (one, other), start in zip(pairs, ours.factors[name], strict=True):
            assert (one - start).abs().mean() > 0.02, "tolerance is larger than what is trained"
            assert_same_but_for_few(one, other, 2e-3, few=0.04)
        assert_same_but_for_few(ours.linears[name].scale, linear.scale, 2e-5, few=0.04)
        merged = ours.linears[name].freeze()
        x = torch.randn(3, merged.in_features)
        # But for float16, to which scales are rounded, the merged weight is the one that was trained.
        expected = functional.linear(x, merged.dequantize())
        assert (ours.linears[name](x) - expected).norm() < 2e-3 * expected.norm()


def test_a_line_falls_to_its_end_after_the_warm_up() -> None:
    factors = [rate_factor("linear", step, 12, 0.1, 2) for step in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    steps = [one - other for one, other in itertools.pairwise(factors[2:])]
    assert steps == pytest.approx([0.09] * 9)
    assert rate_factor("linear", 12, 12, 0.1, 2) == pytest.approx(0.1)


def test_integers_move_and_zero_points_and_norms_only_where_asked(lm: CausalLM) -> None:
    config = settings(train=("factors", "zero_points", "norms"), lr_quant=0.8, downcast="bfloat16")
    trained = Trained(lm, config)
    packed = trained.packed()
    assert sum(int((packed[n].codes() != w.codes()).sum()) for n, w in trained.start.items()) > 0
    assert any(not torch.equal(packed[n].zero_point, w.zero_point) for n, w in trained.start.items())
    assert all(weight.codes().max() <= 7 for weight in packed.values())
    before = norms_of(lm.load_block(0))
    moved = trained_norms(trained.blocks[0])
    assert moved.keys() == before.keys()
    assert not any(torch.equal(moved[name], before[name]) for name in moved)
    scales_only = Trained(lm, settings(train=("scales",)))
    for name, weight in scales_only.packed().items():
        assert torch.equal(weight.words, scales_only.start[name].words)
        assert torch.equal(weight.zero_point, scales_only.start[name].zero_point)
        assert not torch.equal(weight.scale, scales_only.start[name].scale)
    assert not trained_norms(scales_only.blocks[0])


def test_norms_are_trained_in_float32_whatever_blocks_compute_in(lm: CausalLM) -> None:
    block = lm.load_block(0, dtype=torch.bfloat16)
    groups = norm_groups(block, 0.5, relative=True)
    names = norms_of(block)
    assert names.keys() == norms_of(lm.load_block(0)).keys()
    assert all(parameter.dtype == torch.float32 for parameter in names.values())
    hidden = torch.randn(2, LENGTH, lm.hidden_size, dtype=torch.bfloat16)
    out = lm.run_block(block, 0, hidden)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().square().sum(), [p for g in groups for p in g.parameters])
    assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)
    assert torch.equal(out, lm.run_block(lm.load_block(0, dtype=torch.bfloat16), 0, hidden))


@pytest.mark.parametrize("form", get_args(Downcast))
def test_no_weight_of_any_block_outlives_the_forward_pass(lm: CausalLM, form: Any) -> None:
    """Activations are kept here, so whatever is kept of weights shows: as it is, transposed or in groups."""
    config = settings(downcast=form, micro_batch_size=1, epochs=1)  # no activation has a weight's shape
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trained = Trained(lm, config)
    linears = trained.linears.values()
    frozen = {linear.kept.data_ptr() for linear in linears}
    assert any(tensor.data_ptr() in frozen for tensor in seen)
    shapes: set[tuple[int, ...]] = set()
    for linear in linears:
        rows, columns, groups = linear.a.shape[0], linear.b.shape[1], linear.scale.shape[1]
        shapes |= {tuple(sorted((rows, columns))), tuple(sorted((rows, groups, columns // groups)))}
    like_weights = [
        t for t in seen if tuple(sorted(t.squeeze().shape)) in shapes and t.data_ptr() not in frozen
    ]
    assert not like_weights, [(t.shape, t.dtype) for t in like_weights]


def test_factors_in_bfloat16_are_trained_as_well(lm: CausalLM) -> None:
    trained = Trained(lm, settings(factor_dtype="bfloat16", loss="kl", val_sequences=VAL))
    assert all(linear.a.dtype == torch.bfloat16 and linear.a.any() for linear in trained.linears.values())
    assert trained.result.initial_loss is not None
    assert trained.result.val_loss is not None
    assert trained.result.val_loss < trained.result.initial_loss


def test_out_of_memory_again_and_again_it_takes_the_same_steps(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(micro_batch_size=4)
    whole = Trained(lm, config)
    plain_step, calls = Network.micro_step, [0]

    def short(network: Network, rows: Tensor, *rest: Any) -> Tensor:
        calls[0] += 1
        if calls[0] in (2, 4, 6, 9) and (len(rows) > 1 or not network.recompute):
            raise torch.OutOfMemoryError
        return plain_step(network, rows, *rest)

    monkeypatch.setattr(Network, "micro_step", short)
    heard = Heard()
    tight = Trained(lm, config, progress=heard)
    assert [code for code, _ in heard.warnings] == ["memory", "micro_batch", "micro_batch"]
    for name, linear in whole.linears.items():
        assert_same_but_for_few(tight.linears[name].a, linear.a, 2e-3, few=0.04)


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


def test_a_training_that_was_interrupted_ends_with_the_same_bits(lm: CausalLM) -> None:
    """A snapshot holds all that factors in bfloat16 go on from. No file is written here: whole runs, with
    factors in float32, are killed in engine/test_low_rank_runs.py."""
    config = settings(
        loss="kl", val_sequences=VAL, factor_dtype="bfloat16", factor_start="svd", zero_factor="b"
    )
    whole = Trained(lm, config).packed()
    keeper = Interrupter(5)
    with pytest.raises(StopRequested):
        Trained(lm, config, keeper=keeper)
    assert keeper.left is not None
    continued = Trained(lm, config, snapshot=keeper.left).packed()
    for name, weight in whole.items():
        assert torch.equal(continued[name].words, weight.words)
        assert torch.equal(continued[name].scale, weight.scale)


def test_full_training_starts_at_the_weights_themselves_and_moves_norms(lm: CausalLM) -> None:
    """Full QAT: what LR-QAT approximates, by E2E-QAT from the weights that were rounded."""
    config = E2EQATConfig(
        enabled=True,
        train=("weights", "scales", "norms"),
        start="latents",
        sequences=TRAIN,
        val_sequences=0,
        batch_size=4,
        micro_batch_size=4,
        epochs=2,
        loss="cross_entropy",
    )
    blocks, linears = [], []
    for index, packed in enumerate(rounded(lm)):
        block = lm.load_block(index)
        named = latent_linears(block, packed, originals(lm, index, packed))
        for name, linear in named.items():
            assert torch.equal(linear.freeze().words, packed.linears[name].words)
            restored = linear.weight.reshape(*linear.scale.shape, -1) * linear.scale.unsqueeze(-1)
            stored = slot(lm.load_block(index), name).linear().weight
            torch.testing.assert_close(restored.flatten(1), stored)
        blocks.append(block)
        linears += named.values()
    before = [linear.freeze() for linear in linears]
    train_weights(
        lm,
        blocks,
        data(lm, config),
        config.resolved(GRID),
        seed=5,
        dtype=torch.float32,
        progress=Heard(),
        recompute=False,
    )
    after = [linear.freeze() for linear in linears]
    assert any(not torch.equal(one.words, other.words) for one, other in zip(before, after, strict=True))
    assert not any(torch.equal(p, norms_of(lm.load_block(0))[n]) for n, p in trained_norms(blocks[0]).items())
