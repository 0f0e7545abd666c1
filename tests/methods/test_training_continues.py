"""A training that is interrupted at any step boundary and continued elsewhere ends with the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from quiet import Heard
from torch import Tensor, nn

from engine.config.block_ap import BlockAPConfig
from engine.config.e2e_qp import E2EQPConfig
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.data.activations import make_store
from engine.errors import StopRequested
from engine.methods.advance import Portions, advance
from engine.methods.blockwise.block_ap import train_block
from engine.methods.blockwise.reconstruction import Streams
from engine.methods.blockwise.rtn import round_to_nearest
from engine.methods.network.e2e_qp import train_scales
from engine.methods.network.network import NetworkData
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.training.snapshot import Snapshot

CPU = torch.device("cpu")
TRAIN, VAL, LENGTH = 7, 2, 16
GRID = GridConfig(bits=2, group_size=32)


class Interrupter(Heard):
    """Keeps the state at every boundary and ends the training at the ``stop_at``-th.

    What is kept goes through JSON, as it will on the disk, and shares no memory with the training.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.left: Snapshot | None = None
        self.seen = 0
        self.at = stop_at

    def step_boundary(self, state: Callable[[], Snapshot]) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.left = kept(state())
            raise StopRequested


class Keeper(Heard):
    """Keeps the state at every boundary and lets the training go on."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Snapshot] = []

    def step_boundary(self, state: Callable[[], Snapshot]) -> None:
        self.kept.append(kept(state()))


def kept(state: Snapshot) -> Snapshot:
    tensors, facts = state
    return Snapshot(
        {name: tensor.detach().clone() for name, tensor in tensors.items()}, json.loads(json.dumps(facts))
    )


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder: Path = tiny.build(tmp_path_factory.mktemp("model"), "llama2", num_hidden_layers=2)
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), CPU, torch.float32)


def block_ap(lm: CausalLM, snapshot: Snapshot | None, progress: Heard, **changes: Any) -> dict[str, Tensor]:
    values: dict[str, Any] = {"batch_size": 2, "epochs": 3, "lr_scaling": "relative", **changes}
    config = BlockAPConfig(lr_weight=0.5, lr_quant=0.05, **values)
    ids = tiny.tokens(TRAIN + VAL, LENGTH)
    stores = [make_store("device", (*ids.shape, lm.hidden_size), torch.float32, CPU) for _ in range(2)]
    for store in stores:
        store.write(0, lm.embed(ids))
    block = lm.load_block(0, dtype=torch.float32)
    advance(lm, 0, block, stores[0], Portions(2), torch.float32, Heard())
    result = train_block(
        lm,
        0,
        block,
        Streams(*stores, TRAIN),
        config,
        GRID,
        seed=1,
        dtype=torch.float16 if changes.get("compute_dtype") == "float16" else torch.float32,
        progress=progress,
        snapshot=snapshot,
        keeper=progress,
    )
    losses = torch.tensor([result.initial_loss, result.final_loss, result.val_loss or 0.0])
    return {**result.packed.tensors(), "losses": losses}


def e2e_qp(
    lm: CausalLM, snapshot: Snapshot | None, progress: Heard, recompute: bool = True, **changes: Any
) -> dict[str, Tensor]:
    values: dict[str, Any] = {"batch_size": 3, "micro_batch_size": 2, "epochs": 3, "loss": "cross_entropy"}
    values |= {"lr": 0.3, "lr_scaling": "relative", "train": ("scales", "zero_points"), **changes}
    config = E2EQPConfig(**values)
    blocks: list[nn.Module] = [
        round_to_nearest(lm.load_block(i), lm.linear_names(i), GRID).install(lm.load_block(i))
        for i in range(lm.blocks)
    ]
    data = NetworkData(tiny.tokens(TRAIN + VAL, LENGTH, seed=3), TRAIN, None)
    result = train_scales(
        lm,
        blocks,
        data,
        config,
        seed=5,
        dtype=torch.float32,
        progress=progress,
        snapshot=snapshot,
        keeper=progress,
        recompute=recompute,
    )
    trained = {f"{i}.{n}": p for i, b in enumerate(blocks) for n, p in b.named_parameters()}
    losses = torch.tensor([result.initial_loss or 0.0, result.val_loss or 0.0])
    return {**{name: parameter.detach().clone() for name, parameter in trained.items()}, "losses": losses}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", [block_ap, e2e_qp])
@pytest.mark.parametrize("changes", [{}, {"patience": 1}, {"grad_clip": 1e-3, "weight_decay": 0.1}], ids=str)
def test_interrupted_at_every_boundary_it_ends_with_the_same_bits(
    lm: CausalLM, method: Callable[..., dict[str, Tensor]], changes: dict[str, Any]
) -> None:
    """Trained to each boundary once: what an interruption there leaves is what is kept in passing."""
    listener, keeper = Interrupter(), Keeper()
    whole = method(lm, None, listener, **changes)
    assert listener.seen > 4
    assert equal(method(lm, None, keeper, **changes), whole), "to keep the state changes nothing"
    assert len(keeper.kept) == listener.seen
    middle = Interrupter(listener.seen // 2)
    with pytest.raises(StopRequested):
        method(lm, None, middle, **changes)
    assert middle.left is not None
    assert middle.left.facts == keeper.kept[listener.seen // 2 - 1].facts
    assert equal(middle.left.tensors, keeper.kept[listener.seen // 2 - 1].tensors)
    for number, left in enumerate(keeper.kept, start=1):
        rest = Interrupter()
        assert equal(method(lm, left, rest, **changes), whole), f"stopped at boundary {number}"
        assert rest.seen <= listener.seen - left.facts["sampler"]["step"], "it took steps again"


@pytest.mark.parametrize("train", [("rounding", "clipping"), ("rounding", "scales", "zero_points")])
def test_what_is_trained_in_part_ends_with_the_same_bits_too(lm: CausalLM, train: tuple[str, ...]) -> None:
    """What bounds it is no state of the training: it is where the block started."""
    test_interrupted_at_every_boundary_it_ends_with_the_same_bits(lm, block_ap, {"train": train})


@pytest.mark.parametrize("method", [block_ap, e2e_qp])
def test_interrupted_again_and_again_it_ends_with_the_same_bits(
    lm: CausalLM, method: Callable[..., dict[str, Tensor]]
) -> None:
    whole = method(lm, None, Heard())
    snapshot, attempts = None, 0
    while True:
        part = Interrupter(6 if method is block_ap else 4)
        attempts += 1
        try:
            result = method(lm, snapshot, part)
        except StopRequested:
            assert attempts < 40
            snapshot = part.left
            continue
        break
    assert attempts > 3
    assert equal(result, whole)


def test_half_precision_continues_with_its_loss_scale(lm: CausalLM) -> None:
    whole = block_ap(lm, None, Heard(), compute_dtype="float16")
    for stop_at in (6, 9):
        first = Interrupter(stop_at)
        with pytest.raises(StopRequested):
            block_ap(lm, None, first, compute_dtype="float16")
        assert first.left is not None
        assert first.left.facts["step.scaler"]["scale"] > 1
        assert equal(block_ap(lm, first.left, Heard(), compute_dtype="float16"), whole)


# -- restarts and memory, across an interruption -------------------------------------------------------


def test_a_restart_at_half_the_learning_rate_is_continued_as_one(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three bad steps in the first attempt at the training; the interruption comes after it began again."""
    from engine.methods.blockwise.reconstruction import Reconstruction

    real = Reconstruction.micro_step
    calls = 0

    def poisoned(self: Any, rows: Tensor, weight: float, scale: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = real(self, rows, weight, scale)
        return loss * float("nan") if 2 <= calls <= 4 else loss

    monkeypatch.setattr(Reconstruction, "micro_step", poisoned)
    heard = Heard(due=True)
    whole = block_ap(lm, None, heard)
    assert [code for code, _ in heard.warnings] == ["rollback"]
    calls = 0
    first = Interrupter(20)
    with pytest.raises(StopRequested):
        block_ap(lm, None, first)
    assert first.left is not None
    assert first.left.facts["restarts"] == 1
    assert equal(block_ap(lm, first.left, Heard()), whole)


class Small:
    """A device on which only ``room`` sequences fit through a block at a time."""

    def __init__(self, lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 100
        real = lm.block_kwargs

        def block_kwargs(index: int, batch: int, *args: Any) -> dict[str, Any]:
            if batch > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
            return real(index, batch, *args)

        monkeypatch.setattr(lm, "block_kwargs", block_kwargs)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize("method", [block_ap, e2e_qp])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_batch(
    lm: CausalLM, method: Callable[..., dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = method(lm, None, Heard(), batch_size=4) if method is block_ap else method(lm, None, Heard())
    changes: dict[str, Any] = {"batch_size": 4} if method is block_ap else {}
    with monkeypatch.context() as patch:
        other = Small(lm, patch)
        other.room = 100
        result = None

        class Shrinking(Heard):
            """The memory goes after the third step."""

            def step_boundary(self, state: Callable[[], Snapshot]) -> None:
                super().step_boundary(state)
                if self.boundaries == 12:
                    other.room = 1

        heard = Shrinking(due=True)
        result = method(lm, None, heard, **changes)
    codes = [code for code, _ in heard.warnings]
    assert codes.count("micro_batch") == (2 if method is block_ap else 1), heard.warnings
    for name, tensor in whole.items():
        assert result[name].dtype == tensor.dtype
    assert torch.allclose(result["losses"], whole["losses"], rtol=2e-2), "the effective batch is the same"


def test_end_to_end_training_recomputes_activations_before_it_halves_anything(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = e2e_qp(lm, None, Heard(), micro_batch_size=1, batch_size=2)
    real, kept = lm.block_kwargs, 0
    heard = Heard()

    def block_kwargs(index: int, *args: Any) -> dict[str, Any]:
        """From the third step on, there is no room for the activations of a second block."""
        nonlocal kept
        kept += heard.boundaries >= 3 and torch.is_grad_enabled() and index == 1
        if kept == 1 and index == 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return real(index, *args)

    monkeypatch.setattr(lm, "block_kwargs", block_kwargs)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    result = e2e_qp(lm, None, heard, recompute=False, micro_batch_size=1, batch_size=2)
    assert heard.warnings == [("memory", "e2e_qp: out of memory; going on by recomputing activations")]
    assert equal(result, whole)


def test_out_of_memory_with_one_sequence_is_raised(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Small(lm, monkeypatch)

    class Gone(Heard):
        def step_boundary(self, state: Callable[[], Snapshot]) -> None:
            super().step_boundary(state)
            if self.boundaries == 12:
                small.room = 0

    with pytest.raises(torch.OutOfMemoryError):
        block_ap(lm, None, Gone())


def test_a_stream_computed_again_passes_in_the_same_portions(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory went in the middle of a passage; the second passage knows where, though it has enough."""
    ids = tiny.tokens(9, LENGTH)
    sizes: list[int] = []
    small = Small(lm, monkeypatch)
    limited = lm.run_block

    def recorded(block: nn.Module, index: int, hidden: Tensor, **often: bool) -> Tensor:
        if len(sizes) == 1:
            small.room = 1
        output = limited(block, index, hidden, **often)
        sizes.append(len(hidden))
        return output

    def passed(portions: Portions) -> Tensor:
        store = make_store("device", (*ids.shape, lm.hidden_size), torch.float32, CPU)
        store.write(0, lm.embed(ids))
        block = lm.load_block(0, dtype=torch.float32)
        advance(lm, 0, block, store, portions, torch.float32, Heard())
        return store.read(slice(0, 9))

    monkeypatch.setattr(lm, "run_block", recorded)
    portions = Portions(4)
    first = passed(portions)
    assert sizes == [4, 1, 1, 1, 1, 1]
    sizes.clear()
    small.room = 100
    monkeypatch.setattr(
        lm, "run_block", lambda *a, **often: (sizes.append(len(a[2])), CausalLM.run_block(lm, *a, **often))[1]
    )
    assert torch.equal(passed(Portions(4, json.loads(json.dumps(portions.halvings)))), first)
    assert sizes == [4, 1, 1, 1, 1, 1]
