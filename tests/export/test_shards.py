"""The safetensors writer: files any reader opens, whatever the order, sizes and number of shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from engine.architecture.headers import INDEX_NAME, SINGLE_NAME, header_room
from engine.export.shards import ShardWriter

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.uint8, torch.int64, torch.bool]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 2, shape, generator=draw).to(dtype)
        if not dtype.is_floating_point
        else torch.randn(shape, generator=draw).to(dtype)
    )


def write(directory: Path, tensors: dict[str, torch.Tensor], shard_bytes: int) -> list[Path]:
    writer = ShardWriter(directory, shard_bytes=shard_bytes, header_bytes=header_room(tensors))
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.close()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)
entries = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(entries=entries, shard_bytes=st.sampled_from([1, 64, 200, 1 << 20]))
def test_the_safetensors_library_reads_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[tuple[int, ...], torch.dtype]],
    shard_bytes: int,
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"layer.{i}.t": random_tensor(s, d, i) for i, (s, d) in enumerate(entries)}
    files = write(directory, tensors, shard_bytes)
    loaded: dict[str, torch.Tensor] = {}
    for path in files:
        loaded.update(load_file(path))
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


def test_one_shard_is_a_plain_file_without_an_index(tmp_path: Path) -> None:
    files = write(tmp_path, {"a": torch.ones(4), "b": torch.zeros(8)}, 1 << 20)
    assert [path.name for path in files] == [SINGLE_NAME]
    assert sorted(path.name for path in tmp_path.iterdir()) == [SINGLE_NAME]


def test_many_shards_are_numbered_and_indexed_and_stay_below_the_limit(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((64,), float(i)) for i in range(7)}
    files = write(tmp_path, tensors, 600)
    assert [path.name for path in files] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 7 * 256
    for name, file_name in index["weight_map"].items():
        assert same(load_file(tmp_path / file_name)[name], tensors[name])
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 600 for path in files)
    assert not list(tmp_path.glob("*.writing"))


def test_a_tensor_larger_than_a_shard_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    files = write(tmp_path, {"a": torch.ones(8), "big": torch.ones(100), "c": torch.ones(8)}, 64)
    assert [list(load_file(path)) for path in files] == [["a"], ["big"], ["c"]]


def test_same_tensors_give_same_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.uint8), "b": torch.ones(3, 4)}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first, second = (write(tmp_path / d, tensors, 1 << 20)[0].read_bytes() for d in ("one", "two"))
    assert first == second


def test_a_name_written_twice_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_bytes=1000, header_bytes=header_room(["a", "a"]))
    writer.add("a", torch.ones(2))
    with pytest.raises(ValueError, match="twice"):
        writer.add("a", torch.ones(2))
    writer.abandon()


def test_memory_while_writing_is_one_tensor_not_one_shard(tmp_path: Path) -> None:
    """Tensors go to the disk as they arrive: the file has grown before the shard is closed."""
    writer = ShardWriter(tmp_path, shard_bytes=1 << 30, header_bytes=header_room(["t0", "t1"]))
    writer.add("t0", torch.ones(1 << 20))
    writer.add("t1", torch.ones(1 << 20))
    (open_file,) = tmp_path.glob("*.writing")
    assert open_file.stat().st_size >= 7 << 20
    writer.close()
