"""Block-AP's fast steps train what the plain ones train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from quiet import Heard
from torch import Tensor

pytest.importorskip("triton")

from engine.config.block_ap import BlockAPConfig
from engine.config.grid import GridConfig
from engine.config.model import ModelConfig
from engine.config.runtime import StoreKind
from engine.data.activations import make_store
from engine.errors import NonFiniteError, StopRequested
from engine.methods.blockwise import block_ap
from engine.methods.blockwise.block_ap import BlockResult, train_block
from engine.methods.blockwise.fast_reconstruction import FastReconstruction
from engine.methods.blockwise.reconstruction import Reconstruction, Streams
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.quant import quant_step, shard_kernel
from engine.training.snapshot import Snapshot
from engine.training.world import World

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRAIN, VAL, LENGTH = 5, 2, 16
GRID = GridConfig(bits=3, group_size=32)
WHOLE_MATRIX = 1 << 14
"""Values that a program of the kernel may hold where the kernel is interpreted. That takes as long for a few
values as for many; with the usual number a step of this block is 36 programs instead of 7, and a training
takes seconds. How a matrix is divided among programs is the subject of test_quant_step.py."""


@pytest.fixture
def lm(tmp_path: Path) -> CausalLM:
    folder = tiny.build(tmp_path / "model", "llama2", num_hidden_layers=1)
    return CausalLM(ModelSource.open(ModelConfig(source=str(folder))), DEVICE, torch.float32)


def settings(**changes: object) -> BlockAPConfig:
    values: dict[str, object] = {
        "sequences": TRAIN,
        "val_sequences": VAL,
        "sequence_length": LENGTH,
        "batch_size": 2,
        "epochs": 2,
        "lr_weight": 0.02,
        "lr_quant": 0.005,
    }
    return BlockAPConfig(**{**values, **changes})  # type: ignore[arg-type]


class Watch(Heard):
    """Tells which way of training was taken, and can be interrupted at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(due=True)
        self.at, self.left, self.steps = stop_at, None, 0
        self.left: Snapshot | None

    def step_boundary(self, state: Callable[[], Snapshot]) -> None:
        self.steps += 1
        if self.steps == self.at:
            taken = state()
            self.left = Snapshot({k: v.detach().cpu().clone() for k, v in taken.tensors.items()}, taken.facts)
            raise StopRequested


def streams_of(lm: CausalLM, kind: StoreKind, folder: Path) -> Streams:
    ids = tiny.tokens(TRAIN + VAL, LENGTH)
    hidden = lm.embed(ids).cpu()
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    shape = (TRAIN + VAL, LENGTH, lm.hidden_size)
    full, quantized = (
        make_store(kind, shape, torch.float32, DEVICE, path=folder / f"{name}.bin")
        for name in ("full", "quantized")
    )
    full.write(0, hidden * 2 + noise)
    quantized.write(0, hidden)
    return Streams(full, quantized, TRAIN)


Train = Callable[..., tuple[BlockResult, Watch]]


@pytest.fixture
def train(lm: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    usual = quant_step.HELD_VALUES

    def run(
        fast: bool,
        *,
        usual_programs: bool = DEVICE.type == "cuda",
        grid: GridConfig = GRID,
        kind: StoreKind = "device",
        watch: Watch | None = None,
        snapshot: Snapshot | None = None,
        micro_batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 7,
        **changes: object,
    ) -> tuple[BlockResult, Watch]:
        watch = watch or Watch()
        monkeypatch.setattr(quant_step, "HELD_VALUES", usual if usual_programs else WHOLE_MATRIX)
        streams = streams_of(lm, kind, tmp_path)
        block = lm.load_block(0, dtype=torch.float32)
        config = settings(**changes)
        result = train_block(
            *(lm, 0, block, streams, config, grid),
            seed=seed,
            dtype=dtype,
            progress=watch,
            snapshot=snapshot,
            keeper=watch,
            micro_batch=micro_batch,
            fast=fast,
        )
        return result, watch

    return run


def same_training(one: tuple[BlockResult, Watch], other: tuple[BlockResult, Watch], rtol: float) -> None:
    (plain, heard), (fast, heard_fast) = one, other
    assert heard_fast.warnings == heard.warnings == []
    for key in ("loss", "grad_norm"):
        values = [[m[key] for m in h.metrics if m.get(key) is not None] for h in (heard, heard_fast)]
        assert values[0] == pytest.approx(values[1], rel=rtol), key
    rates = [[m.get("lr") for m in h.metrics] for h in (heard, heard_fast)]
    assert rates[0] == rates[1]
    assert fast.final_loss == pytest.approx(plain.final_loss, rel=rtol)
    assert fast.val_loss == pytest.approx(plain.val_loss, rel=rtol)
    for name, weight in plain.packed.linears.items():
        # A weight that lies between two integers may go to either.
        differ = weight.codes() != fast.packed.linears[name].codes()
        assert differ.float().mean() < 0.01
        assert torch.allclose(weight.scale, fast.packed.linears[name].scale, rtol=1e-2)
    for name, tensor in plain.packed.others.items():
        assert torch.allclose(tensor, fast.packed.others[name], rtol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"usual_programs": True},
        {"micro_batch": 1},
        {"batch_size": 3, "micro_batch": 2},
        {"loss": "mse", "lr_scaling": "absolute", "lr_weight": 1e-3, "lr_quant": 1e-3},
        {"grid": GridConfig(bits=2, group_size=-1)},
        {"grid": GridConfig(bits=4, group_size=64, symmetric=True)},
        {"grid": GridConfig(bits=2, group_size=-1, zero_point="fixed")},
        {"train": ("scales",)},
        {"train": ("norms",)},
        {"train": ("weights", "zero_points")},
        {"weight_decay": 0.1, "epochs": 1},
        {"drop_largest": 0.01, "epochs": 1},
        {"val_sequences": 0, "batch_size": 8},
        {"kind": "host"},
        {"kind": "disk"},
    ],
    ids=str,
)
def test_fast_steps_train_like_plain_ones(train: Train, options: dict[str, Any]) -> None:
    same_training(train(False, **options), train(True, **options), rtol=2e-3)


def test_half_precision_scales_its_loss(train: Train) -> None:
    plain, fast = (train(fast, dtype=torch.float16) for fast in (False, True))
    same_training(plain, fast, rtol=3e-2)


@pytest.mark.parametrize("seed", [0] if DEVICE.type == "cpu" else range(8))
@pytest.mark.parametrize("kind", ["disk"] if DEVICE.type == "cpu" else ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_trains_as_well_as_full(
    train: Train, dtype: torch.dtype, kind: StoreKind, seed: int
) -> None:
    """Wherever the activations live, and although the first overflows cost a step."""
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds to bfloat16 as no GPU does")
    plain, _ = train(False, seed=seed, epochs=4)
    fast, watch = train(True, dtype=dtype, kind=kind, seed=seed, epochs=4)
    assert watch.warnings == []
    assert fast.val_loss == pytest.approx(plain.val_loss, rel=5e-2)
    assert fast.final_loss == pytest.approx(plain.final_loss, rel=5e-2)


def test_the_fast_way_is_the_one_that_is_tested(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for kind in (Reconstruction, FastReconstruction):
        real = kind.micro_step

        def counted(self: Any, *args: Any, kind: type = kind, real: Any = real) -> Tensor:
            calls.append(kind.__name__)
            return real(self, *args)

        monkeypatch.setattr(kind, "micro_step", counted)
    train(True)
    assert set(calls) == {"FastReconstruction"}


# Without a GPU the kernels are interpreted, seconds for a training.
@pytest.mark.parametrize(
    ("stop_at", "options"),
    [(4, {"micro_batch": 1})]
    if DEVICE.type == "cpu"
    else [(stop_at, options) for stop_at in (1, 3, 4, 8) for options in ({}, {"micro_batch": 1})],
    ids=str,
)
def test_an_interrupted_training_ends_with_the_same_bits(
    train: Train, stop_at: int, options: dict[str, Any]
) -> None:
    whole, _ = train(True, **options)
    watch = Watch(stop_at)
    with pytest.raises(StopRequested):
        train(True, watch=watch, **options)
    assert watch.left is not None
    continued, _ = train(True, snapshot=watch.left, **options)
    for name, tensor in whole.packed.tensors().items():
        assert torch.equal(tensor, continued.packed.tensors()[name]), name
    assert continued.final_loss == whole.final_loss


def test_a_snapshot_of_plain_steps_is_continued_by_fast_ones(train: Train) -> None:
    watch = Watch(4)
    with pytest.raises(StopRequested):
        train(False, watch=watch)
    assert watch.left is not None
    whole, _ = train(False)
    continued, _ = train(True, snapshot=watch.left)
    assert continued.final_loss == pytest.approx(whole.final_loss, rel=1e-2)


def test_a_restart_begins_with_the_first_weights(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = FastReconstruction.micro_step, 0

    def poisoned(self: Any, rows: Tensor, weight: float, scale: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = real(self, rows, weight, scale)
        return loss * float("nan") if 2 <= calls <= 4 else loss

    monkeypatch.setattr(FastReconstruction, "micro_step", poisoned)
    result, watch = train(True)
    assert [code for code, _ in watch.warnings] == ["rollback"]
    assert result.final_loss < result.initial_loss
    halved, _ = train(True, lr_weight=0.01, lr_quant=0.0025)
    assert result.final_loss == pytest.approx(halved.final_loss, rel=1e-3)


def test_losses_that_are_never_finite_end_the_training(lm: CausalLM, train: Train) -> None:
    real = lm.block_kwargs
    lm.embed = lambda ids: torch.full((*ids.shape, lm.hidden_size), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError):
        train(True)
    assert lm.block_kwargs == real


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a recorded step does not pass where memory is made to go")
def test_memory_that_goes_halves_the_micro_batch(
    lm: CausalLM, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the fourth step only one sequence fits; the gradients are added up then."""
    whole, _ = train(True, batch_size=4)
    watch, real = Watch(), lm.block_kwargs

    def block_kwargs(index: int, batch: int, *args: Any) -> dict[str, Any]:
        if watch.steps >= 4 and batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(index, batch, *args)

    monkeypatch.setattr(FastReconstruction, "_differentiate", _asking_first(block_kwargs))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    result, watch = train(True, batch_size=4, watch=watch)
    assert [code for code, _ in watch.warnings] == ["micro_batch", "micro_batch"]
    assert result.final_loss == pytest.approx(whole.final_loss, rel=2e-2)


def _asking_first(block_kwargs: Callable[..., Any]) -> Callable[..., Any]:
    real = FastReconstruction._differentiate

    def differentiate(self: FastReconstruction, tensors: list[Tensor], *args: Any) -> Any:
        block_kwargs(self.index, *tensors[0].shape[:2], tensors[0].dtype)
        return real(self, tensors, *args)

    return differentiate


def test_where_triton_does_not_work_the_plain_steps_take_over(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_ap, "_obstacle", lambda device, **wanted: "Failed to find C compiler")
    plain, _ = train(False)
    result, watch = train(True)
    assert watch.warnings == [
        ("compile", "block 0: steps are slower, Triton does not work here: Failed to find C compiler")
    ]
    for name, tensor in plain.packed.tensors().items():
        assert torch.equal(tensor, result.packed.tensors()[name])


def test_a_share_of_several_ranks_is_a_usual_batch(
    lm: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank takes its part of the batch; the loss of a part counts whole on its rank."""
    monkeypatch.setattr(quant_step, "HELD_VALUES", WHOLE_MATRIX)
    monkeypatch.setattr(shard_kernel, "HELD_BYTES", WHOLE_MATRIX)
    streams = streams_of(lm, "device", tmp_path)
    block = lm.load_block(0, dtype=torch.float32)
    watch = Watch()
    train_block(
        *(lm, 0, block, streams, settings(batch_size=4), GRID),
        seed=0,
        dtype=torch.float32,
        progress=watch,
        keeper=watch,
        fast=True,
        world=World(0, 2),
    )
    assert watch.warnings == []
