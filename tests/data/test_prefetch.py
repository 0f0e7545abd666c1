"""Reading ahead and writing behind change when something happens, never what. On a GPU the copies are under
way beside the work; without one everything is done at once."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from engine.config.runtime import StoreKind
from engine.data.activations import ActivationStore, make_store
from engine.data.prefetch import InPlace, Prefetcher, WriteBehind, to_device
from engine.errors import EqatError, ExitCode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS: tuple[StoreKind, ...] = ("device", "host", "disk")
ROWS, LENGTH, HIDDEN = 23, 40, 96


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ActivationStore]:
    shape = (ROWS, LENGTH, HIDDEN)
    with make_store(request.param, shape, torch.float32, DEVICE, tmp_path / "store.bin") as made:
        yield made


def content(seed: int) -> Tensor:
    return torch.randn(ROWS, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def whole(store: ActivationStore) -> Tensor:
    return store.read(slice(None)).cpu()


def batches(size: int) -> list[range]:
    return [range(start, min(start + size, ROWS)) for start in range(0, ROWS, size)]


def pass_through(store: ActivationStore, size: int, slow: Tensor, ahead: int) -> None:
    parts = batches(size)
    with InPlace(store) as carried:
        for number, rows in enumerate(parts, 1):
            hidden = carried.read(rows, parts[number : number + ahead])
            for _ in range(20):  # work that takes longer than a copy
                slow = slow @ slow
            carried.write(rows.start, torch.tanh(hidden) + slow[0, 0] * 0)


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
@pytest.mark.parametrize("size", [1, 4, 23, 40])
def test_a_stream_passed_in_place_is_what_one_by_one_would_make_it(
    store: ActivationStore, size: int, ahead: int
) -> None:
    expected = content(0)
    store.write(0, expected)
    slow = torch.full((1500, 1500), 1 / 1500, device=DEVICE) if DEVICE.type == "cuda" else torch.zeros(2, 2)
    for _ in range(3):
        pass_through(store, size, slow, ahead)
        expected = torch.tanh(expected.to(DEVICE)).cpu()
    assert torch.equal(whole(store), expected)


def test_a_batch_that_was_not_expected_is_read_all_the_same(store: ActivationStore) -> None:
    values = content(1)
    store.write(0, values)
    reader = Prefetcher((store, store))
    targets = [torch.empty(3, LENGTH, HIDDEN, device=DEVICE) for _ in range(2)]
    for read, expected in (([4, 2, 9], [1, 2, 3]), ([1, 2, 3], [7, 8, 22]), ([0, 22, 22], [5, 5, 5])):
        reader.read_into(torch.tensor(read), targets)
        for target in targets:
            assert torch.equal(target.cpu(), values[read])
        reader.expect(torch.tensor(expected))
    reader.close()


def test_batches_may_be_expected_twice_wrongly_or_out_of_order(store: ActivationStore) -> None:
    values = content(3)
    store.write(0, values)
    reader = Prefetcher((store,))
    drawn = random.Random(0)
    coming = [range(row, row + 3) for row in range(0, 18, 3)]
    for _ in range(60):
        for expected in drawn.choices(coming, k=drawn.randint(0, 4)):
            reader.expect(expected)
        rows = drawn.choice(coming)
        (read,) = reader.read(rows)
        assert torch.equal(read.cpu(), values[rows.start : rows.stop])
    reader.close()


def test_a_batch_for_which_memory_did_not_suffice_is_not_expected(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type != "cuda" or store.kind == "device":
        pytest.skip("nothing is read ahead")
    values = content(4)
    store.write(0, values)
    reader = Prefetcher((store,))
    with monkeypatch.context() as full:
        full.setattr(torch, "empty", mock.Mock(side_effect=torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            reader.expect(range(2))
    for _ in range(2):
        (read,) = reader.read(range(2))
        assert torch.equal(read.cpu(), values[:2])
        reader.expect(range(2))
    reader.close()


def test_what_is_written_before_a_batch_is_read_is_in_it(store: ActivationStore) -> None:
    """The first batch is expected before anything was read."""
    for seed in range(5):
        values = content(seed)
        store.write(0, values.to(DEVICE))
        reader = Prefetcher((store,))
        reader.expect(torch.arange(6))
        target = torch.empty(6, LENGTH, HIDDEN, device=DEVICE)
        reader.read_into(torch.arange(6), [target])
        reader.close()
        assert torch.equal(target.cpu(), values[:6])


def fails(start: int, tensor: Tensor) -> None:
    raise EqatError("no room", exit_code=ExitCode.DISK_FULL)


def test_a_write_that_fails_is_said(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> None:
        with WriteBehind(store) as writer:
            for row in range(4):
                writer.write(row, torch.zeros(1, LENGTH, HIDDEN, device=DEVICE))

    monkeypatch.setattr(store, "write", fails)
    with pytest.raises(EqatError, match="no room"):
        write()


def test_what_ended_the_passage_is_what_is_said_of_it(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> None:
        with InPlace(store) as carried:
            hidden = carried.read(range(2), [range(2, 4), range(4, 6)])
            monkeypatch.setattr(store, "write", fails)
            with contextlib.suppress(EqatError):  # at once, without a thread
                carried.write(0, hidden)
            raise KeyError

    store.write(0, content(0))
    with pytest.raises(KeyError):
        begin()
    assert torch.equal(whole(store), content(0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_to_device_is_a_copy_on_the_device(dtype: torch.dtype) -> None:
    values = torch.arange(70_000).to(dtype)
    moved = to_device(values, DEVICE)
    assert moved.device.type == DEVICE.type
    assert torch.equal(moved.cpu(), values)
