"""A further method of the whole network brings its parameters and their domain, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from quiet import Heard
from torch import Tensor, nn
from torch.nn import functional

from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.errors import NonFiniteError
from engine.methods.network.network import Network, NetworkData, train_network
from engine.methods.network.teacher import Teacher
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.training.loop import Settings
from engine.training.stepper import ParameterGroup

CPU = torch.device("cpu")
TRAIN, VAL, LENGTH = 6, 3, 16
LARGEST = 1.5


class Norms(Network):
    """Trains the norms of blocks that are not quantized at all, up to a bound."""

    def __init__(self, lm: CausalLM, data: NetworkData, lr: float) -> None:
        blocks = [lm.load_block(index) for index in range(lm.blocks)]
        super().__init__(lm, blocks, data, torch.float32)
        parameters = [p for block in blocks for p in block.parameters() if p.ndim == 1]
        self.groups = [ParameterGroup("norms", [p.requires_grad_(True) for p in parameters], lr)]

    @torch.no_grad()
    def project(self) -> None:
        for parameter in self.groups[0].parameters:
            parameter.clamp_(-LARGEST, LARGEST)


def settings(epochs: int = 2) -> Settings:
    return Settings(
        epochs=epochs,
        batch_size=2,
        micro_batch=1,
        weight_decay=0.0,
        grad_clip=0.0,
        lr_final_fraction=1.0,
        patience=0,
        seed=3,
        device=CPU,
        dtype=torch.float32,
        where="norms",
        tokens_per_sequence=LENGTH,
    )


@pytest.fixture
def lm(tmp_path: Path) -> CausalLM:
    tiny.build(tmp_path / "model", "llama2", num_hidden_layers=2)
    return CausalLM(ModelSource.open(ModelConfig(source=str(tmp_path / "model"))), CPU, torch.float32)


def last_hidden(lm: CausalLM, blocks: list[nn.Module], ids: Tensor) -> Tensor:
    hidden = lm.embed(ids)
    for index, block in enumerate(blocks):
        hidden = lm.run_block(block, index, hidden)
    return hidden


@torch.no_grad()
def test_cross_entropy_of_all_blocks_is_the_models_own_and_training_lowers_it(lm: CausalLM) -> None:
    ids = tiny.tokens(TRAIN, LENGTH, seed=3)
    ids = torch.cat([ids, ids[:VAL]])
    blocks = [lm.load_block(index) for index in range(lm.blocks)]
    logits = lm.head(last_hidden(lm, blocks, ids[TRAIN:]))[:, :-1].float()
    by_hand = functional.cross_entropy(logits.flatten(0, 1), ids[TRAIN:, 1:].flatten().long())
    network = Norms(lm, NetworkData(ids, TRAIN, None), lr=0.05)
    with torch.enable_grad():
        result = train_network(network, settings(), Heard())
    assert result.initial_loss == pytest.approx(by_hand.item(), rel=1e-5)
    assert result.val_loss is not None
    assert result.initial_loss is not None
    assert result.val_loss < result.initial_loss
    assert result.steps == 2 * TRAIN // 2
    assert max(p.abs().max().item() for p in network.groups[0].parameters) <= LARGEST


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(lm: CausalLM) -> None:
    ids = tiny.tokens(TRAIN + VAL, LENGTH, seed=3)
    store = make_store("device", (*ids.shape, lm.hidden_size), torch.float32, CPU)
    blocks = [lm.load_block(index) for index in range(lm.blocks)]
    with torch.no_grad():
        store.write(0, last_hidden(lm, blocks, ids))
    teacher = Teacher(store)
    result = train_network(Norms(lm, NetworkData(ids, TRAIN, teacher), lr=0.0), settings(1), Heard())
    assert result.initial_loss == pytest.approx(0.0, abs=1e-5)
    assert result.val_loss == result.initial_loss


def test_a_validation_that_is_never_finite_names_the_method(lm: CausalLM) -> None:
    network = Norms(lm, NetworkData(tiny.tokens(TRAIN + VAL, LENGTH), TRAIN, None), lr=0.0)
    network.validate = lambda micro_batch: float("nan")  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"^norms: the validation loss is not finite after 6 steps"):
        train_network(network, settings(), Heard())
