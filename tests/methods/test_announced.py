"""Gradients that say when they are there, and set out for other ranks then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from quiet import Heard
from several import together
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

pytest.importorskip("triton")

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.gpu.recorded import Graphed
from engine.methods.blockwise import shared_step
from engine.methods.blockwise.block_ap import train_block
from engine.methods.blockwise.reconstruction import Streams
from engine.methods.blockwise.shared_step import Row
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.quant import quant_step, shard_kernel
from engine.quant.announced import Announcements, announced
from engine.training import sharded
from engine.training.world import World, close_world, meeting_place, open_world

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
WHOLE_MATRIX = 1 << 14
"""Values that a program of a kernel holds: the interpreter is slow for each program."""
MLP, LINEARS = {4, 5, 6}, 7
"""Numbers of a Llama block's linears."""


class Chain(nn.Module):
    """Three linears after each other, whose weights announce their gradients."""

    def __init__(self, announcements: Announcements, device: torch.device) -> None:
        super().__init__()
        self.weights = [torch.randn(8, 8, device=device, requires_grad=True) for _ in range(3)]
        self.tokens = announcements.tokens

    def forward(self, x: Tensor) -> Tensor:
        for number, weight in enumerate(self.weights):
            x = functional.linear(x, announced(weight, self.tokens[number], number)).sin()
        return x


def test_gradients_are_announced_from_the_last_layer_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(Announcements, "come", Announcements.come)  # as it is afterwards
    announcements, came = Announcements(3, cpu), numbers_seen()
    announcements.listen()
    chain, x = Chain(announcements, cpu), torch.randn(5, 8)
    wanted = [*chain.weights, *announcements.tokens]
    gradients = torch.autograd.grad(chain(x).sum(), wanted)[:3]
    plain = x
    for weight in chain.weights:
        plain = functional.linear(plain, weight).sin()
    for one, expected in zip(gradients, torch.autograd.grad(plain.sum(), chain.weights), strict=True):
        assert torch.equal(one, expected)
    assert came == [2, 1, 0]
    assert announcements.hold_for(gradients)
    assert not announcements.hold_for([gradients[0], gradients[1].clone(), gradients[2]]), "a copy came later"
    announcements.close()
    torch.autograd.grad(chain(x).sum(), wanted)
    assert came == [2, 1, 0], "nobody listens any more"


def block(world: World, lm: CausalLM, batch: int, length: int, **options: Any) -> dict[str, Tensor]:
    """A block that is trained by fast steps: three batches, and half a one."""
    train, device = 3 * batch + batch // 2, lm.device
    hidden = lm.embed(tiny.tokens(train, length).to(device))
    target = lm.run_block(lm.load_block(0), 0, hidden)
    stores = []
    for whole in (target, hidden):
        own = whole[world.rank :: world.size]
        stores.append(make_store("device", (*own.shape,), own.dtype, device))  # type: ignore[arg-type]
        stores[-1].write(0, own)
    config = BlockAPConfig(
        sequences=train, val_sequences=0, sequence_length=length, batch_size=batch, epochs=1, start="range"
    )
    grid = GridConfig(bits=2, group_size=32)
    result = train_block(
        *(lm, 0, lm.load_block(0, dtype=torch.float32), Streams(stores[0], stores[1], train, world)),
        *(config.resolved(grid), grid),
        seed=3,
        dtype=hidden.dtype,
        progress=Heard(due=world.rank == 0),
        world=world,
        micro_batch=batch // world.size,
        fast=True,
        **options,
    )
    return {name: tensor.cpu() for name, tensor in result.packed.tensors().items()}


def steps_seen() -> list[bool]:
    """From now on in this process, whether a step's gradients set out as they come."""
    early, add = list[bool](), Row.add

    def seen(self: Row, gradients: Any, part: float | None, announced: Announcements | None) -> Tensor:
        early.append(announced is not None)
        return add(self, gradients, part, announced)

    Row.add = seen  # type: ignore[method-assign]
    return early


def numbers_seen() -> list[int]:
    """From now on in this process, the numbers that are announced."""
    came, come = list[int](), Announcements.come

    def noted(self: Announcements, number: int, gradient: Tensor) -> None:
        came.append(number)
        come(self, number, gradient)

    Announcements.come = noted  # type: ignore[method-assign]
    return came


def watched(world: World, lm: CausalLM) -> tuple[list[int], list[bool]]:
    """What a training announces, and which of its steps use it."""
    came, early = numbers_seen(), steps_seen()
    block(world, lm, 4, 16)
    assert Announcements.listening is None, "the training is over"
    return came, early


def test_gradients_of_a_block_set_out_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_step, "HELD_VALUES", WHOLE_MATRIX)
    monkeypatch.setattr(shard_kernel, "HELD_BYTES", WHOLE_MATRIX)
    for module in (sharded, shared_step):  # each linear is a portion of its own, as in a large model
        monkeypatch.setattr(module, "LARGE_BYTES", 1)
    folder = tiny.build(tmp_path / "model", "llama2", num_hidden_layers=1)
    cpu = torch.device("cpu")
    lm = CausalLM(ModelSource.open(ModelConfig(source=str(folder))), cpu, torch.float32)
    for came, early in together(2, tmp_path, watched, lm):
        assert early == [True, True, True, False], "the last batch is not one of the usual size"
        for start in range(0, len(came), LINEARS):
            step = came[start : start + LINEARS]
            assert set(step[:3]) == MLP
            assert sorted(step) == list(range(LINEARS))


@GPU
def test_another_stream_goes_on_while_a_recorded_step_does() -> None:
    """It sees what this replay has made, not the one before, and is done before the replay is."""
    device = torch.device("cuda")
    announcements, made = Announcements(1, device), torch.zeros(1 << 20, device=device)
    copied, counted = torch.empty_like(made), torch.zeros((), device=device)

    def step() -> Tensor:
        torch.cuda._sleep(20_000_000)  # some ten milliseconds
        counted.add_(1)
        made.copy_(counted.expand_as(made))
        announcements.come(0, made)
        torch.cuda._sleep(200_000_000)
        return made

    step()
    graph = Graphed(step, device, pytest.fail)
    for count in range(2, 6):
        graph()
        end = torch.cuda.Event()
        end.record()
        with announcements.beside([0]):
            copied.copy_(made)
            done = torch.cuda.Event()
            done.record()
        done.synchronize()
        assert not end.query(), "it has waited for the whole step"
        assert (copied == count).all()
        end.synchronize()


def _trained_twice(rank: int, port: int, folder: Path, compiles: bool) -> None:
    """As they come, and after the backward pass: the same bits."""
    torch.cuda.set_device(rank)
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", rank)
    world = open_world(meeting_place("127.0.0.1", port, 2, hosts=rank == 0), rank, 2, device)
    for module in (sharded, shared_step):
        module.LARGE_BYTES = 1  # type: ignore[attr-defined]
    lm = CausalLM(ModelSource.open(ModelConfig(source=str(folder))), device, torch.bfloat16)
    steps = steps_seen()
    early = block(world, lm, 8, 512, compiles=compiles)
    assert steps == [True, True, True, False]
    Announcements.hold_for = lambda self, gradients: False  # type: ignore[method-assign]
    late = block(world, lm, 8, 512, compiles=compiles)
    assert not any(steps[4:])
    for name, tensor in late.items():
        assert torch.equal(tensor, early[name]), name
    world.least([0])
    close_world()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compiles", [False, True])
def test_what_sets_out_early_is_what_would_have_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
    folder = tiny.build(tmp_path / "model", "llama2", num_hidden_layers=1, num_key_value_heads=16, **sizes)
    port = meeting_place("127.0.0.1", 0, 1, hosts=True).port
    spawn(_trained_twice, (port, folder, compiles), nprocs=2)
