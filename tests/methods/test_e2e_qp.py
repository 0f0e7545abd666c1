"""E2E-QP against a loop written by hand over the whole transformers model, and its switches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from quiet import Heard
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from engine.config.e2e_qp import E2EQPConfig
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.data.sampler import BatchSampler
from engine.errors import NonFiniteError
from engine.methods.blockwise.rtn import round_to_nearest
from engine.methods.network.e2e_qp import train_scales
from engine.methods.network.network import NetworkData
from engine.methods.network.norms import trained_norms
from engine.methods.network.teacher import Teacher
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.quant.packed import LARGEST_STORED_SCALE, PackedBlock, PackedLinear, PackedWeight
from engine.quant.slots import slot
from engine.training.schedule import cosine_factor

CPU = torch.device("cpu")
TRAIN, VAL, LENGTH = 8, 2, 16
GRID = GridConfig(bits=3, group_size=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.build(tmp_path / "model", "llama2", num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture
def lm(folder: Path) -> CausalLM:
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)


def settings(**changes: object) -> E2EQPConfig:
    values: dict[str, object] = {
        "sequences": TRAIN,
        "val_sequences": 0,
        "sequence_length": LENGTH,
        "batch_size": 4,
        "micro_batch_size": 2,
        "epochs": 3,
        "loss": "cross_entropy",
        "lr_scaling": "absolute",
        "lr": 1e-3,
        "warmup_fraction": 0.2,
    }
    return E2EQPConfig(**{**values, **changes})  # type: ignore[arg-type]


def rounded(lm: CausalLM, grid: GridConfig = GRID) -> list[PackedBlock]:
    return [round_to_nearest(lm.load_block(i), lm.linear_names(i), grid) for i in range(lm.blocks)]


def installed(lm: CausalLM, packed: list[PackedBlock]) -> list[nn.Module]:
    return [block.install(lm.load_block(i)) for i, block in enumerate(packed)]


def teacher_hidden(lm: CausalLM, ids: Tensor) -> Tensor:
    hidden = lm.embed(ids)
    for index in range(lm.blocks):
        hidden = lm.run_block(lm.load_block(index), index, hidden)
    return hidden


def data(lm: CausalLM, config: E2EQPConfig) -> NetworkData:
    ids = tiny.tokens(TRAIN + config.val_sequences, LENGTH, seed=3)
    if config.loss == "cross_entropy":
        return NetworkData(ids, TRAIN, None)
    store = make_store("device", (*ids.shape, lm.hidden_size), torch.float32, CPU)
    store.write(0, teacher_hidden(lm, ids))
    return NetworkData(ids, TRAIN, Teacher(store))


def train(
    lm: CausalLM, config: E2EQPConfig, grid: GridConfig = GRID, recompute: bool = True
) -> list[nn.Module]:
    blocks = installed(lm, rounded(lm, grid))
    train_scales(
        *(lm, blocks, data(lm, config), config),
        seed=5,
        dtype=torch.float32,
        progress=Heard(),
        recompute=recompute,
    )
    return blocks


def packed_linears(blocks: list[nn.Module]) -> dict[str, PackedLinear]:
    return {
        f"{i}.{name}": module
        for i, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, PackedLinear)
    }


class HandLinear(nn.Module):
    """(q - z) * s with a float weight in the graph, so that autograd derives the gradient of s."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        codes = weight.codes().float().reshape(*weight.scale.shape, -1)
        self.centred = codes - weight.zero_point.float().unsqueeze(-1)
        self.scale = nn.Parameter(weight.scale.float())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, (self.centred * self.scale.unsqueeze(-1)).flatten(1))


@pytest.mark.parametrize(
    ("loss", "train_set"), [("cross_entropy", ("scales",)), ("kl", ("scales",)), ("kl", ("scales", "norms"))]
)
def test_a_two_block_model_trained_by_a_hand_written_loop_gives_the_same_scales(
    folder: Path, lm: CausalLM, loss: str, train_set: tuple[str, ...]
) -> None:
    config = settings(loss=loss, train=train_set)
    blocks = train(lm, config)
    ours = packed_linears(blocks)

    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval()
    by_hand: dict[str, HandLinear] = {}
    for index, block in enumerate(rounded(lm)):
        for name, weight in block.linears.items():
            by_hand[f"{index}.{name}"] = linear = HandLinear(weight)
            slot(model, f"model.layers.{index}.{name}").set(linear)
    trained = [linear.scale for linear in by_hand.values()]
    norms = {
        name.removeprefix("model.layers."): norm
        for name, norm in model.named_parameters()
        if name.startswith("model.layers.") and name.endswith("layernorm.weight") and "norms" in train_set
    }
    began = {name: norm.detach().clone() for name, norm in norms.items()}
    trained += [norm.requires_grad_() for norm in norms.values()]
    optimizer = torch.optim.AdamW(trained, weight_decay=0, fused=False)
    sampler = BatchSampler(TRAIN, 4, 3, seed=5)
    ids = tiny.tokens(TRAIN, LENGTH, seed=3)
    for _, step, rows in sampler:
        logits = model(ids[rows]).logits
        if loss == "kl":
            with torch.no_grad():
                target = teacher(ids[rows]).logits.log_softmax(-1)
            difference = target.exp() * (target - logits.log_softmax(-1))
            value = difference.sum(-1).mean()
        else:
            value = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[rows][:, 1:].flatten())
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, config.grad_clip)
        warmup = math.ceil(0.2 * sampler.steps)
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine_factor(step, sampler.steps, 0.0, warmup)
        optimizer.step()
    assert ours.keys() == by_hand.keys()
    for name, linear in by_hand.items():
        assert_same_but_for_few(ours[name].scale, linear.scale)
    found = {
        f"{i}.{name}": norm for i, block in enumerate(blocks) for name, norm in trained_norms(block).items()
    }
    assert found.keys() == norms.keys()
    for name, norm in norms.items():
        assert not torch.equal(norm, began[name])
        assert_same_but_for_few(found[name], norm)


def assert_same_but_for_few(one: Tensor, other: Tensor) -> None:
    """Adam divides a gradient by its own size: next to nothing, rounding decides its direction."""
    off = ~torch.isclose(one, other, rtol=1e-3, atol=2e-5)
    assert off.float().mean() < 0.01, f"{off.sum()} of {off.numel()} differ"


def test_the_integers_never_change_and_only_scales_move(lm: CausalLM) -> None:
    before = packed_linears(installed(lm, rounded(lm)))
    after = packed_linears(train(lm, settings()))
    for name in before:
        assert torch.equal(before[name].words, after[name].words)
        assert torch.equal(before[name].zero_point, after[name].zero_point)
        assert not torch.equal(before[name].scale, after[name].scale)


@pytest.mark.parametrize("train_set", [("zero_points",), ("scales", "zero_points")])
def test_zero_points_can_be_trained_and_stay_integers_in_range(
    lm: CausalLM, train_set: tuple[str, ...]
) -> None:
    before = packed_linears(installed(lm, rounded(lm)))
    after = packed_linears(train(lm, settings(train=train_set, lr=0.6)))
    moved = 0
    for name, layer in after.items():
        packed = layer.packed()
        assert packed.zero_point.dtype == torch.uint8
        assert packed.zero_point.max() <= 7
        # What was trained is what is saved: no zero point has drifted out of the grid.
        assert torch.equal(layer.zero_point.round().to(torch.uint8), packed.zero_point)
        assert layer.zero_point.min() >= 0
        assert layer.zero_point.max() <= 7
        moved += int((packed.zero_point != before[name].zero_point).sum())
        assert torch.equal(layer.words, before[name].words)
        assert torch.equal(layer.scale, before[name].scale) == ("scales" not in train_set)
    assert moved > 0


def test_activation_checkpointing_changes_memory_not_numbers(lm: CausalLM) -> None:
    with_it = packed_linears(train(lm, settings(), recompute=True))
    without = packed_linears(train(lm, settings(), recompute=False))
    for name in with_it:
        assert torch.equal(with_it[name].scale, without[name].scale)


def test_micro_batches_only_split_the_effective_batch(lm: CausalLM) -> None:
    whole = packed_linears(train(lm, settings(micro_batch_size=4)))
    single = packed_linears(train(lm, settings(micro_batch_size=1)))
    for name in whole:
        assert_same_but_for_few(whole[name].scale, single[name].scale)


def test_the_head_runs_in_chunks_without_changing_the_loss(lm: CausalLM) -> None:
    whole = packed_linears(train(lm, settings(loss="kl")))
    lm.head_values = 5 * lm.vocab_size
    chunked = packed_linears(train(lm, settings(loss="kl")))
    for name in whole:
        assert_same_but_for_few(whole[name].scale, chunked[name].scale)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_training_lowers_the_loss_it_trains_on(lm: CausalLM, loss: str) -> None:
    config = settings(loss=loss, val_sequences=0, epochs=12)
    blocks = installed(lm, rounded(lm))
    ids = tiny.tokens(TRAIN, LENGTH, seed=3)
    teacher = teacher_hidden(lm, ids)

    def measure() -> float:
        with torch.no_grad():
            hidden = lm.embed(ids)
            for index, block in enumerate(blocks):
                hidden = lm.run_block(block, index, hidden)
            logits = lm.head(hidden)
            if loss == "kl":
                target = lm.head(teacher).log_softmax(-1)
                return (target.exp() * (target - logits.log_softmax(-1))).sum(-1).mean().item()
            return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    before = measure()
    train_scales(lm, blocks, data(lm, config), config, seed=0, dtype=torch.float32, progress=Heard())
    assert measure() < 0.97 * before


def test_best_validated_scales_are_kept(lm: CausalLM) -> None:
    before = packed_linears(installed(lm, rounded(lm)))
    after = packed_linears(train(lm, settings(loss="kl", val_sequences=VAL, lr=5.0)))
    for name in before:
        assert torch.equal(before[name].scale, after[name].scale)


def test_early_stopping_counts_epochs_without_improvement(lm: CausalLM) -> None:
    config = settings(loss="kl", val_sequences=VAL, lr=5.0, epochs=9, patience=2)
    blocks = installed(lm, rounded(lm))
    result = train_scales(lm, blocks, data(lm, config), config, seed=5, dtype=torch.float32, progress=Heard())
    assert result.steps == 2 * 2


def test_scales_stay_positive_under_a_ruinous_learning_rate(lm: CausalLM) -> None:
    for layer in packed_linears(train(lm, settings(lr=5.0))).values():
        assert (layer.scale > 0).all()


def test_what_is_trained_is_what_is_saved_also_where_float16_ends(lm: CausalLM) -> None:
    """A rate that drives scales far beyond it: they stop at its border, no infinity is written, and the
    training is refused."""
    config, blocks, seen = settings(lr=1e6, epochs=1), installed(lm, rounded(lm)), 0
    with pytest.raises(NonFiniteError, match="a scale has grown to 65504"):
        train_scales(
            lm, blocks, data(lm, config), config, seed=0, dtype=torch.float32, progress=Heard(due=True)
        )
    for layer in packed_linears(blocks).values():
        assert layer.scale.max() <= LARGEST_STORED_SCALE
        saved = layer.packed().scale.float()
        torch.testing.assert_close(saved, layer.scale.detach(), rtol=1e-3, atol=2.0**-25)
        seen += int((layer.scale == LARGEST_STORED_SCALE).sum())
    assert seen, "none came to the border"


def test_divergence_ends_with_exit_code_5_naming_the_phase(lm: CausalLM) -> None:
    config = settings(loss="kl")
    poisoned = data(lm, config)
    assert poisoned.teacher is not None
    poisoned.teacher.store.write(0, torch.full((TRAIN, LENGTH, lm.hidden_size), torch.nan))
    heard = Heard(due=True)
    with pytest.raises(NonFiniteError, match="e2e_qp"):
        train_scales(
            lm, installed(lm, rounded(lm)), poisoned, config, seed=0, dtype=torch.float32, progress=heard
        )
    assert [code for code, _ in heard.warnings] == ["rollback", "rollback"]
