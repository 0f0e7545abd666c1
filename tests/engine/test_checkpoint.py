"""What is committed survives: kills between any two steps of a commit, damage, and being asked twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import checkpoint
from engine.checkpoint import CheckpointStore
from engine.run.errors import EqatError, ExitCode, IdentityError, PreflightError

IDENTITY = {"block_ap.epochs": "2", "model": "a" * 64, "data": "b" * 64}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(8, 4, generator=generator) for name in ("words", "scale", "norm", "bias")}


def filled(directory: Path, generations: int) -> CheckpointStore:
    """Generation ``n`` adds the entry ``block-n``."""
    store = CheckpointStore(directory, IDENTITY)
    for number in range(1, generations + 1):
        store.put(f"block-{number}", tensors(number))
        store.remember("latest", number)
        store.commit()
    return store


def reopened(directory: Path, heard: list[str] | None = None) -> CheckpointStore:
    return CheckpointStore(directory, IDENTITY, on_damage=(heard if heard is not None else []).append)


def check(store: CheckpointStore, generation: int) -> None:
    """Exactly the entries up to ``generation`` are there, bit for bit."""
    assert store.fact("latest") == (generation or None)
    for number in range(1, 10):
        assert (f"block-{number}" in store) == (number <= generation)
        if number <= generation:
            found, meant = store.get(f"block-{number}"), tensors(number)
            assert list(found) == sorted(meant), "in the same order each time"
            assert all(torch.equal(found[name], meant[name]) for name in meant)


def object_of(directory: Path, generation: int, name: str) -> Path:
    content = json.loads((directory / f"generation-{generation:06d}.json").read_text())
    return directory / "objects" / f"{content['entries'][name]}.safetensors"


# -- what is kept --------------------------------------------------------------------------------------


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    entries=st.dictionaries(
        st.text("abc-0123456789", min_size=1, max_size=12),
        st.dictionaries(
            st.text("xyz._", min_size=1, max_size=8), st.integers(0, 2**16), min_size=1, max_size=4
        ),
        max_size=5,
    ),
    facts=st.dictionaries(
        st.text(max_size=8), st.none() | st.booleans() | st.floats() | st.text() | st.lists(st.integers())
    ),
)
def test_whatever_is_committed_is_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    entries: Mapping[str, Mapping[str, int]],
    facts: Mapping[str, object],
) -> None:
    directory = tmp_path_factory.mktemp("checkpoints")
    store = CheckpointStore(directory, IDENTITY)
    made = {
        name: {key: torch.arange(seed % 50) - seed for key, seed in parts.items()}
        for name, parts in entries.items()
    }
    for name, parts in made.items():
        store.put(name, parts)
    for key, value in facts.items():
        store.remember(key, value)
    store.commit()
    again = reopened(directory)
    for name, parts in made.items():
        found = again.get(name)
        assert found.keys() == parts.keys()
        assert all(torch.equal(found[key], parts[key]) for key in parts)
    for key, value in facts.items():
        assert repr(again.fact(key)) == repr(value)


def test_a_new_store_is_empty_and_nothing_counts_before_its_commit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, IDENTITY)
    assert store.fact("latest") is None
    store.put("block-1", tensors(1))
    assert "block-1" not in reopened(tmp_path)
    store.commit()
    assert "block-1" in reopened(tmp_path)


def test_two_generations_are_kept_and_finished_blocks_are_written_once(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, IDENTITY)
    written = {}
    for number in range(1, 6):
        store.put(f"block-{number}", tensors(number))
        store.remember("latest", number)
        committed = store.commit()
        assert committed.generation == number
        written[number] = committed.bytes
    assert sorted(path.name for path in tmp_path.glob("generation-*")) == [
        "generation-000004.json",
        "generation-000005.json",
    ]
    assert len(list((tmp_path / "objects").iterdir())) == 5
    assert written[5] - written[1] < 1000, "a commit writes its own block, not those before"
    check(reopened(tmp_path), 5)


def test_equal_content_is_stored_once_and_replaced_content_goes_when_no_generation_names_it(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path, IDENTITY)
    store.put("one", tensors(1))
    store.put("two", tensors(1))
    store.commit()
    assert len(list((tmp_path / "objects").iterdir())) == 1
    for seed in (2, 3, 4):
        store.put("one", tensors(seed))
        store.commit()
    assert len(list((tmp_path / "objects").iterdir())) == 3, "tensors 1 (entry two), 3 and 4"


# -- damage --------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "a flipped bit": lambda path: path.write_bytes(
        path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])
    ),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_object_falls_back_to_the_generation_before_and_says_so(
    tmp_path: Path, damage: str
) -> None:
    filled(tmp_path, 3)
    DAMAGES[damage](object_of(tmp_path, 3, "block-3"))
    heard: list[str] = []
    check(reopened(tmp_path, heard), 2)
    assert len(heard) == 1
    assert "generation 3" in heard[0]
    assert "going back" in heard[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_same_work_done_again_repairs_what_was_damaged(tmp_path: Path, damage: str) -> None:
    """The run is deterministic: it arrives at the same object, whose damaged file must not be trusted."""
    filled(tmp_path, 3)
    DAMAGES[damage](object_of(tmp_path, 3, "block-3"))
    store = reopened(tmp_path)
    store.put("block-3", tensors(3))
    store.remember("latest", 3)
    store.commit()
    heard: list[str] = []
    check(reopened(tmp_path, heard), 3)
    assert not heard


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"schema": 1}', b'{"entries": 3}', b"\xff\xfe"]
)
def test_a_damaged_generation_file_falls_back_too(tmp_path: Path, content: bytes) -> None:
    filled(tmp_path, 3)
    (tmp_path / "generation-000003.json").write_bytes(content)
    heard: list[str] = []
    check(reopened(tmp_path, heard), 2)
    assert len(heard) == 1


def test_when_both_generations_are_damaged_the_error_says_so_and_touches_nothing(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    DAMAGES["truncated"](object_of(tmp_path, 3, "block-1"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    heard: list[str] = []
    with pytest.raises(EqatError) as caught:
        reopened(tmp_path, heard)
    assert caught.value.exit_code == ExitCode.IDENTITY
    assert "no usable checkpoint" in caught.value.message
    assert "checksum" in caught.value.message
    assert not heard, "nothing was gone back to"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", [b"", b"three", b"\xff"])
def test_a_damaged_pointer_is_refused_and_nothing_is_guessed(tmp_path: Path, content: bytes) -> None:
    filled(tmp_path, 3)
    (tmp_path / "CURRENT").write_bytes(content)
    with pytest.raises(EqatError) as caught:
        reopened(tmp_path)
    assert caught.value.exit_code == ExitCode.IDENTITY
    assert "CURRENT" in caught.value.message
    (command,) = re.findall(r"echo .*CURRENT", caught.value.hint)
    subprocess.run(command, shell=True, check=True)
    assert reopened(tmp_path).generation == 3


def test_damage_while_the_run_uses_it_is_an_error_and_not_garbage(tmp_path: Path) -> None:
    store = filled(tmp_path, 2)
    DAMAGES["a flipped bit"](object_of(tmp_path, 2, "block-2"))
    with pytest.raises(EqatError, match="changed while the run was using it"):
        store.get("block-2")
    check_only = store.get("block-1")
    assert torch.equal(check_only["words"], tensors(1)["words"])


# -- whose it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", IDENTITY)
def test_another_identity_is_refused_by_the_field_that_differs(tmp_path: Path, field: str) -> None:
    filled(tmp_path, 2)
    with pytest.raises(IdentityError) as caught:
        CheckpointStore(tmp_path, {**IDENTITY, field: "3"})
    assert caught.value.where == field
    assert caught.value.exit_code == 8


def test_fields_that_came_or_went_are_refused_too(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    for other, field in (
        ({**IDENTITY, "grid.new": "1"}, "grid.new"),
        ({"model": "a" * 64}, "block_ap.epochs"),
    ):
        with pytest.raises(IdentityError) as caught:
            CheckpointStore(tmp_path, other)
        assert caught.value.where == field


def test_a_checkpoint_of_another_schema_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    path = tmp_path / "generation-000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(IdentityError, match="99"):
        reopened(tmp_path)


# -- kills ---------------------------------------------------------------------------------------------


def commit_third(directory: Path) -> None:
    store = reopened(directory)
    store.put("block-3", tensors(3))
    store.remember("latest", 3)
    store.commit()


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "unlink"])
def test_a_kill_at_any_point_of_a_commit_leaves_one_of_the_two_generations(tmp_path: Path, call: str) -> None:
    """The n-th system call of a kind never returns, for every n; the next process finds one whole."""
    n = 0
    while True:
        n += 1
        directory = tmp_path / f"{call}-{n}"
        filled(directory, 2)
        if not killed_at(directory, call, n):
            break
        store = reopened(directory)
        check(store, store.fact("latest"))
        assert store.fact("latest") in (2, 3)
        commit_third(directory)
        heard: list[str] = []
        check(reopened(directory, heard), 3)
        assert not heard
        leftovers = [path for path in directory.rglob("*") if path.suffix == ".tmp"]
        assert not leftovers, "half-written files are removed by the next commit"
    # object, generation file, CURRENT; each fsync is of the file and of its folder
    assert n - 1 >= {"write": 3, "fsync": 6, "replace": 3, "unlink": 1}[call]


def killed_at(directory: Path, call: str, n: int) -> bool:
    """Commit in a forked process that ends at its n-th ``call``; False when it finished before."""
    child = os.fork()
    if child == 0:
        try:
            end_at(call, n)
            commit_third(directory)
        except BaseException:
            os._exit(2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the commit itself failed"
    return code == 9


def end_at(call: str, n: int) -> None:
    """In this process, the ``n``-th use of a system call is its last act (half done, for a write)."""
    owner, name = (os, call) if call != "write" else (checkpoint, "atomic_write")
    real = getattr(owner, name)
    calls = 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == n:
            if call == "write":
                path, pieces = Path(str(args[0])), args[1]
                data = pieces if isinstance(pieces, bytes) else b"".join(pieces)  # type: ignore[call-overload]
                path.with_name(f".{path.name}.half.tmp").write_bytes(data[: len(data) // 2])
            os._exit(9)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def test_a_failed_write_is_reported_and_loses_nothing(tmp_path: Path) -> None:
    store = filled(tmp_path, 2)
    objects = tmp_path / "objects"
    objects.rename(tmp_path / "elsewhere")
    objects.write_text("in the way")
    with pytest.raises(PreflightError, match="cannot be written"):
        store.put("block-3", tensors(3))
    objects.unlink()
    (tmp_path / "elsewhere").rename(objects)
    check(reopened(tmp_path), 2)


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="cannot be written"):
        CheckpointStore(tmp_path / "file" / "checkpoints", IDENTITY)
