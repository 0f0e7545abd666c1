"""Several processes train what one process would have trained from the same batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from quiet import Heard
from several import together
from torch import Tensor, nn

from engine.config.block_ap import BlockAPConfig
from engine.config.e2e_qat import E2EQATConfig
from engine.config.e2e_qp import E2EQPConfig
from engine.config.grid import GridConfig
from engine.config.lr_qat import LRQATConfig
from engine.config.model import ModelConfig
from engine.data.activations import ActivationStore, DeviceStore, make_store
from engine.errors import NonFiniteError
from engine.methods.blockwise import shared_step
from engine.methods.blockwise.block_ap import train_block
from engine.methods.blockwise.reconstruction import Streams
from engine.methods.blockwise.rtn import round_to_nearest
from engine.methods.network.e2e_qat import train_weights
from engine.methods.network.e2e_qp import train_scales
from engine.methods.network.lr_qat import low_rank_linears, train_factors
from engine.methods.network.network import NetworkData
from engine.methods.network.teacher import Teacher
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.phases.text import Windows
from engine.quant import quant_step, shard_kernel
from engine.quant.fake_linear import FakeQuantLinear, latent_linears
from engine.training import sharded
from engine.training.averaged import Averaged
from engine.training.snapshot import Snapshot
from engine.training.world import ALONE, Together, World

CPU = torch.device("cpu")
GRID = GridConfig(bits=2, group_size=32)
TRAIN, VAL, LENGTH = 10, 3, 16
BATCH = 4
"""The last batch of an epoch has two sequences: half of four ranks have none of it."""


@pytest.fixture
def lm(tmp_path: Path) -> CausalLM:
    folder = tiny.build(tmp_path / "model", "llama2", num_hidden_layers=1)
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)


def stored(hidden: Tensor) -> ActivationStore:
    store = make_store("device", tuple(hidden.shape), torch.float32, CPU)  # type: ignore[arg-type]
    store.write(0, hidden)
    return store


def block(
    world: World, lm: CausalLM, options: dict[str, Any], **kept: Any
) -> tuple[dict[str, Tensor], Any, list[str], int]:
    """A block's training: what came of it, its losses, what was warned of, and how many sequences passed at a
    time."""
    options = dict(options)
    val = options.pop("val", VAL)
    fast, train = options.pop("fast", False) and world.several, options.pop("sequences", TRAIN)
    hidden = lm.embed(tiny.tokens(train + val, LENGTH))
    target = lm.run_block(lm.load_block(0), 0, hidden)
    here = slice(world.rank, None, world.size)
    values = {"batch_size": BATCH, "epochs": 2, "lr_weight": 1e-3, "lr_quant": 1e-3, "loss": "mse", **options}
    config = BlockAPConfig(
        sequences=train, val_sequences=val, sequence_length=LENGTH, lr_scaling="absolute", **values
    )
    heard, trained = Heard(due=world.rank == 0), lm.load_block(0, dtype=torch.float32)
    result = train_block(
        *(lm, 0, trained, Streams(stored(target[here]), stored(hidden[here]), train, world), config, GRID),
        seed=3,
        dtype=torch.float32,
        progress=heard,
        world=world,
        micro_batch=BATCH // world.size if fast else BATCH // 2,
        fast=fast,
        **kept,
    )
    losses = result.initial_loss, result.final_loss, result.val_loss, result.steps
    return result.packed.tensors(), losses, [code for code, _ in heard.warnings], result.micro_batch


def taught(lm: CausalLM, world: World) -> NetworkData:
    tokens = tiny.tokens(TRAIN + VAL, LENGTH, seed=3)
    hidden = lm.embed(tokens)
    for index in range(lm.blocks):
        hidden = lm.run_block(lm.load_block(index), index, hidden)
    own = stored(hidden[world.rank :: world.size])
    return NetworkData(tokens, TRAIN, Teacher(own, world=world), world=world)


def scales(world: World, lm: CausalLM, options: dict[str, Any]) -> tuple[dict[str, Tensor], Any, list[str]]:
    packed = [round_to_nearest(lm.load_block(i), lm.linear_names(i), GRID) for i in range(lm.blocks)]
    blocks = [one.install(lm.load_block(i)) for i, one in enumerate(packed)]
    heard, config = Heard(due=world.rank == 0), E2EQPConfig(**network(options), lr=1e-3)
    result = train_scales(
        *(lm, blocks, taught(lm, world), config), seed=5, dtype=torch.float32, progress=heard, world=world
    )
    return values_of(blocks), (result.initial_loss, result.val_loss), [code for code, _ in heard.warnings]


def integers(
    world: World, lm: CausalLM, options: dict[str, Any], **kept: Any
) -> tuple[dict[str, Tensor], Any, list[str]]:
    options = dict(options)
    fast = options.pop("fast", False) and world.several
    packed = [round_to_nearest(lm.load_block(i), lm.linear_names(i), GRID) for i in range(lm.blocks)]
    blocks = [lm.load_block(i) for i in range(lm.blocks)]
    for made, one in zip(blocks, packed, strict=True):
        latent_linears(made, one, None)
    config = E2EQATConfig(**network(options), lr_weight=1e-3, lr_quant=1e-3)
    heard = Heard(due=world.rank == 0)
    result = train_weights(
        *(lm, blocks, taught(lm, world), config),
        seed=5,
        dtype=torch.float32,
        progress=heard,
        world=world,
        fast=fast,
        **kept,
    )
    for made in blocks:
        assert all(one.quantized is None for one in made.modules() if isinstance(one, FakeQuantLinear)), (
            "only training needs it"
        )
    return values_of(blocks), (result.initial_loss, result.val_loss), [code for code, _ in heard.warnings]


def factors(world: World, lm: CausalLM, options: dict[str, Any]) -> tuple[dict[str, Tensor], Any, list[str]]:
    config = LRQATConfig(**network(options), lr_factors=1e-3, lr_quant=1e-3, rank=4)
    packed = round_to_nearest(lm.load_block(0), lm.linear_names(0), GRID)
    made = lm.load_block(0)
    low_rank_linears(made, latent_linears(made, packed, None), config, 7)
    heard = Heard(due=world.rank == 0)
    result = train_factors(
        *(lm, [made], taught(lm, world), config), seed=5, dtype=torch.float32, progress=heard, world=world
    )
    return values_of([made]), (result.initial_loss, result.val_loss), [code for code, _ in heard.warnings]


def network(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "sequences": TRAIN,
        "val_sequences": VAL,
        "sequence_length": LENGTH,
        "batch_size": BATCH,
        "micro_batch_size": 1,
        "epochs": 2,
        "loss": "kl",
        **options,
    }


def values_of(blocks: list[nn.Module]) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": parameter.detach()
        for i, block in enumerate(blocks)
        for name, parameter in block.named_parameters()
        if parameter.requires_grad
    }


WHOLE_MATRIX = 1 << 14
"""Values that a program of the fast step's kernel holds: the interpreter is slow for each program."""
CASES: list[tuple[int, Callable[..., Any], dict[str, Any]]] = [
    (4, block, {"start": "search", "grad_clip": 0.5}),
    (2, block, {"start": "gptq", "train": ("scales", "norms"), "epochs": 1}),
    (2, block, {"fast": True, "epochs": 1, "sequences": 6}),
    (2, scales, {"epochs": 1}),
    (2, integers, {"epochs": 1}),
    (2, integers, {"epochs": 1, "fast": True, "sequences": 6, "micro_batch_size": 2}),
    (2, factors, {"epochs": 1}),
]


def as_in_a_large_model(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of a kernel holds a whole matrix, and of a block each linear is a portion of its own."""
    monkeypatch.setattr(quant_step, "HELD_VALUES", WHOLE_MATRIX)
    monkeypatch.setattr(shard_kernel, "HELD_BYTES", WHOLE_MATRIX)
    if train is block:  # each linear is a portion of its own, as in a large model
        monkeypatch.setattr(sharded, "LARGE_BYTES", 1)
        monkeypatch.setattr(shared_step, "LARGE_BYTES", 1)


@pytest.mark.parametrize(
    ("ranks", "train", "options"), CASES, ids=lambda value: getattr(value, "__name__", None)
)
def test_the_result_is_that_of_one_process(
    ranks: int,
    train: Callable[..., Any],
    options: dict[str, Any],
    lm: CausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_in_a_large_model(train, monkeypatch)
    first, *others = together(ranks, tmp_path, train, lm, options)
    for other in others:
        assert all(torch.equal(one, other[0][name]) for name, one in first[0].items()), "ranks differ"
        assert other[1] == first[1]
    alone, losses, *_ = train(ALONE, lm, options)
    # GPTQ rounds to integers: a sum in another order turns one over.
    assert first[1] == pytest.approx(losses, rel=1e-2 if options.get("start") == "gptq" else 1e-4)
    for name, expected in alone.items():
        found = first[0][name]
        if expected.is_floating_point():
            # Sums in another order; AdamW's first steps make a whole step of the least gradient.
            error = (found.float() - expected.float()).abs().mean()
            assert error < 2e-3 * expected.float().abs().mean(), name
        else:
            assert (found != expected).float().mean() < 0.02, name


class Kept(Heard):
    """The state after step ``at`` goes into a file, and the training goes on."""

    def __init__(self, at: int, file: Path) -> None:
        super().__init__()
        self.at, self.file, self.asked, self.kept = at, file, 0, False

    def wants_state(self) -> bool:
        self.asked += 1
        return self.asked == self.at

    def step_boundary(self, state: Callable[[], Snapshot] | None) -> None:
        if self.asked == self.at and state is not None and not self.kept:
            self.kept = True
            tensors, facts = state()
            torch.save(({name: tensor.clone() for name, tensor in tensors.items()}, facts), self.file)


def continued(
    world: World, train: Callable[..., Any], lm: CausalLM, options: dict[str, Any], folder: Path
) -> Any:
    """A training, and the same from the state that its first rank kept in the middle."""
    file = folder / "kept"
    whole = train(world, lm, options, keeper=Kept(3, file))
    world.least([0])  # the file is there
    tensors, facts = torch.load(file)
    shapes = [tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("exp_avg")]
    return whole[:2], train(world, lm, options, snapshot=Snapshot(tensors, facts))[:2], shapes


@pytest.mark.parametrize(
    ("ranks", "train", "options"),
    [
        (4, block, {}),
        (2, block, {"fast": True, "sequences": 8}),
        (2, integers, {}),
        (2, integers, {"fast": True, "sequences": 8}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_first_rank_keeps_a_whole_state_from_which_all_go_on(
    ranks: int,
    train: Callable[..., Any],
    options: dict[str, Any],
    lm: CausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what is shared out a rank has the moments of its part alone."""
    as_in_a_large_model(train, monkeypatch)
    for whole, again, shapes in together(ranks, tmp_path, continued, train, lm, options, tmp_path):
        assert again[1] == whole[1]
        assert all(torch.equal(one, again[0][name]) for name, one in whole[0].items())
        hidden, inner = lm.hidden_size, lm.source.config.intermediate_size
        assert {(inner, hidden), (hidden, inner)} <= set(shapes)


def starved(world: World, lm: CausalLM) -> Any:
    """A training in which one rank has memory for a single sequence at a time."""
    read = DeviceStore._read_into

    def scarce(store: DeviceStore, positions: Sequence[int], target: Tensor) -> None:
        if world.rank == 1 and len(positions) > 1:
            raise torch.OutOfMemoryError("no memory for two")
        read(store, positions, target)

    DeviceStore._read_into = scarce  # type: ignore[method-assign]
    return block(world, lm, {"epochs": 1})


def test_memory_of_one_rank_is_that_of_all(lm: CausalLM, tmp_path: Path) -> None:
    first, second = together(2, tmp_path, starved, lm)
    assert all(torch.equal(one, second[0][name]) for name, one in first[0].items())
    assert first[2] == [], "where memory suffices nothing is said"
    assert second[2] == ["micro_batch"]
    assert (first[3], second[3]) == (1, 1), "sequences at a time, from the next step on"


def poisoned(world: World, lm: CausalLM) -> Any:
    """A training whose loss is not finite on one rank."""
    embed = lm.embed
    if world.rank == 1:
        lm.embed = lambda *given: embed(*given) * float("nan")  # type: ignore[method-assign]
    try:
        block(world, lm, {"val": 0})
    except NonFiniteError as error:
        return str(error)


def test_all_ranks_give_up_where_one_diverges(lm: CausalLM, tmp_path: Path) -> None:
    first, second = together(2, tmp_path, poisoned, lm)
    assert "not finite in 3 steps in a row" in first
    assert second == first


def counted(world: World, lm: CausalLM) -> list[int]:
    """How often gradients are added up in an epoch of E2E-QP, whose batches have two micro-batches here."""
    calls: list[int] = []
    add = Averaged.__call__

    def called(averaged: Averaged, gradients: Any, loss: Tensor, part: float | None) -> Tensor:
        calls.append(len(gradients))
        return add(averaged, gradients, loss, part)

    Averaged.__call__ = called  # type: ignore[method-assign]
    scales(world, lm, {"epochs": 1})
    return calls


def test_gradients_are_added_up_once_a_step(lm: CausalLM, tmp_path: Path) -> None:
    for calls in together(2, tmp_path, counted, lm):
        assert len(calls) == -(-TRAIN // BATCH)


def several_things(world: World) -> dict[str, Any]:
    gradients = [torch.full((3,), 1.0 + world.rank), torch.full((2, 2), 10.0 * world.rank).bfloat16()]
    parts_of = torch.arange(8.0) + world.rank
    own = torch.empty(2)
    world.add_parts(parts_of.clone(), own, mean=True)
    world.part(parts_of).copy_(own)
    world.join_parts(parts_of)
    averaged = Averaged(world, gradients, CPU)
    parts = [0.5, 0.25, 0.25, 0.0]  # of a batch of which the last rank has nothing
    lost = torch.tensor(float("nan") if world.rank == 3 else float(world.rank))
    given = [gradients[0], None] if world.rank == 1 else [] if world.rank == 3 else gradients
    loss = averaged(given or [None, None], lost, parts[world.rank])
    values = torch.tensor([float(world.rank)])
    world.alike([values])
    said = Windows(torch.arange(6).view(2, 3), 1)
    assert isinstance(world, Together)
    told = world.told(Windows) if world.rank else said
    if not world.rank:
        world.tell(said)
    assert told.answers is None
    told = (told.tokens_NT.tolist(), told.train)
    return {
        "loss": loss.item(),
        "gradients": [gradient.tolist() for gradient in averaged.gradients],
        "alike": values.item(),
        "parts": parts_of.tolist(),
        "sums": world.sums([world.rank, 0.5]),
        "least": world.least([world.rank, -world.rank]),
        "told": told,
        "gathered": world.gathered("x" * world.rank, str),
        "mean": world.mean(float(world.rank), 0 if world.rank == 3 else 1),
        "none": world.mean(None, 0),
        "share": list(world.share(9)),
    }


def test_what_ranks_know_together(tmp_path: Path) -> None:
    found = together(4, tmp_path, several_things)
    shares = [one.pop("share") for one in found]
    assert sorted(row for share in shares for row in share) == list(range(9))
    assert all(one == found[0] for one in found)
    assert found[0] == {
        "loss": 0.5 * 0 + 0.25 * 1 + 0.25 * 2,
        "gradients": [[0.5 * 1 + 0.25 * 2 + 0.25 * 3] * 3, [[0.25 * 20.0] * 2] * 2],
        "alike": 0.0,
        "parts": [number + 1.5 for number in range(8)],
        "sums": [6.0, 2.0],
        "least": [0, -3],
        "told": ([[0, 1, 2], [3, 4, 5]], 1),
        "gathered": ["", "x", "xx", "xxx"],
        "mean": 1.0,
        "none": None,
    }
