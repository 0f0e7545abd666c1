"""What is committed survives: kills between any two steps of a commit, damage, and being asked twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.checkpoints.store import CheckpointStore
from engine.errors import EqatError, ExitCode, IdentityError, PreflightError
from engine.run import generations, objects

IDENTITY = {"block_ap.epochs": "2", "model": "a" * 64, "data": "b" * 64}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(8, 4, generator=generator) for name in ("words", "scale", "norm", "bias")}


def block(number: int) -> str:
    """The entry that generation ``number`` adds."""
    return f"block-{number - 1:03d}"


def filled(directory: Path, generations: int) -> CheckpointStore:
    """Generation ``n`` adds the ``n``-th block."""
    store = CheckpointStore(directory, IDENTITY)
    for number in range(1, generations + 1):
        store.put(block(number), tensors(number))
        store.remember("latest", number)
        store.commit()
    return store


def reopened(directory: Path, heard: list[str] | None = None) -> CheckpointStore:
    return CheckpointStore(directory, IDENTITY, on_damage=(heard if heard is not None else []).append)


def check(store: CheckpointStore, generation: int) -> None:
    """Exactly the entries up to ``generation`` are there, bit for bit."""
    assert store.fact("latest") == (generation or None)
    for number in range(1, 10):
        assert (block(number) in store) == (number <= generation)
        if number <= generation:
            found, meant = store.get(block(number)), tensors(number)
            assert list(found) == sorted(meant), "in the same order each time"
            assert all(torch.equal(found[name], meant[name]) for name in meant)


def object_of(directory: Path, generation: int, name: str) -> Path:
    return generations.object_path(
        directory, generations.read_generation(directory, generation).entries[name]
    )


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
    store.put(block(1), tensors(1))
    assert block(1) not in reopened(tmp_path)
    store.commit()
    assert block(1) in reopened(tmp_path)


def test_two_generations_are_kept_and_finished_blocks_are_written_once(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, IDENTITY)
    written = {}
    for number in range(1, 6):
        store.put(block(number), tensors(number))
        store.remember("latest", number)
        committed = store.commit()
        assert committed.generation == number
        written[number] = committed.bytes
    assert [name[:17] for name in sorted(path.name for path in tmp_path.glob("*-*"))] == [
        "generation-000004",
        "generation-000005",
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
    DAMAGES[damage](object_of(tmp_path, 3, block(3)))
    heard: list[str] = []
    check(reopened(tmp_path, heard), 2)
    assert len(heard) == 1
    assert "generation 3" in heard[0]
    assert "going back" in heard[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_same_work_done_again_repairs_what_was_damaged(tmp_path: Path, damage: str) -> None:
    """The run is deterministic: it arrives at the same object, whose damaged file must not be trusted."""
    filled(tmp_path, 3)
    DAMAGES[damage](object_of(tmp_path, 3, block(3)))
    store = reopened(tmp_path)
    store.put(block(3), tensors(3))
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
    generations.generation_path(tmp_path, 3).write_bytes(content)
    heard: list[str] = []
    check(reopened(tmp_path, heard), 2)
    assert len(heard) == 1


def test_what_both_generations_share_is_dropped_with_what_depends_on_it(tmp_path: Path) -> None:
    filled(tmp_path, 4)
    DAMAGES["truncated"](object_of(tmp_path, 4, block(2)))
    heard: list[str] = []
    store = reopened(tmp_path, heard)
    assert [block(number) in store for number in (1, 2, 3, 4)] == [True, False, False, False]
    assert len(heard) == 1
    assert "checksum" in heard[0]
    assert "blocks 1 to 3" in heard[0]
    assert "block-001" in store.damage
    for number in (2, 3, 4):
        store.put(block(number), tensors(number))
    store.commit()
    heard.clear()
    check(reopened(tmp_path, heard), 4)
    assert not heard


def test_rounded_blocks_do_not_depend_on_each_other(tmp_path: Path) -> None:
    rounded = {**IDENTITY, "block_ap.enabled": "false"}
    store = CheckpointStore(tmp_path, rounded)
    for number in (1, 2, 3, 4):
        store.put(block(number), tensors(number))
        store.commit()
    DAMAGES["missing"](object_of(tmp_path, 4, block(2)))
    store = CheckpointStore(tmp_path, rounded)
    assert [block(number) in store for number in (1, 2, 3, 4)] == [True, False, True, True]


@pytest.mark.parametrize("damage", DAMAGES)
def test_when_no_generation_can_be_read_the_error_says_so_and_touches_nothing(
    tmp_path: Path, damage: str
) -> None:
    filled(tmp_path, 3)
    for path in tmp_path.glob("generation-*"):
        DAMAGES[damage](path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    heard: list[str] = []
    with pytest.raises(EqatError) as caught:
        reopened(tmp_path, heard)
    assert caught.value.exit_code == ExitCode.IDENTITY
    assert "no usable checkpoint" in caught.value.message
    assert not heard, "nothing was gone back to"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


POINTERS: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "words": b"three",
    "no text": b"\xff",
    "a bare number": b"3\n",
    "a generation before": b"2\n",
    "one that never was": b"9\n",
    "another digest": b"3 " + b"0" * 64 + b"\n",
    "no line": b"3 " + b"0" * 64,
}


@pytest.mark.parametrize("content", POINTERS)
def test_without_its_pointer_the_newest_intact_generation_is_taken_and_said_and_nothing_goes(
    tmp_path: Path, content: str
) -> None:
    filled(tmp_path, 3)
    pointer = POINTERS[content]
    if pointer is None:
        (tmp_path / "CURRENT").unlink()
    else:
        (tmp_path / "CURRENT").write_bytes(pointer)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert generations.prune(tmp_path, keep=1) == 0
    heard: list[str] = []
    store = reopened(tmp_path, heard)
    check(store, 3)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert len(heard) == 1
    assert "CURRENT" in heard[0]
    assert "generation 3" in heard[0]
    store.commit()
    heard.clear()
    check(reopened(tmp_path, heard), 3)
    assert not heard


def test_a_pointer_and_objects_without_any_generation_are_no_new_run(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    for path in tmp_path.glob("generation-*"):
        path.unlink()
    with pytest.raises(EqatError, match="no usable checkpoint") as caught:
        reopened(tmp_path)
    assert caught.value.exit_code == ExitCode.IDENTITY
    assert len(list((tmp_path / "objects").iterdir())) == 3


@pytest.mark.parametrize("cleaned", [False, True])
def test_the_only_generation_survives_any_damage_of_its_file(tmp_path: Path, cleaned: bool) -> None:
    """A run that committed once, and a finished one that was cleaned."""
    filled(tmp_path, 3 if cleaned else 1)
    generations.prune(tmp_path, keep=1)
    (only,) = tmp_path.glob("generation-*")
    for damage in DAMAGES.values():
        content = only.read_bytes()
        damage(only)
        check(reopened(tmp_path), 3 if cleaned else 1)
        only.write_bytes(content)
    (spare,) = tmp_path.glob("spare-*")
    DAMAGES["truncated"](spare)
    check(reopened(tmp_path), 3 if cleaned else 1)
    store = reopened(tmp_path)
    store.commit()
    assert not list(tmp_path.glob("spare-*")), "there is another to fall back to"


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "device"])
def test_what_is_no_regular_file_is_damage_and_is_neither_read_nor_waited_for(
    tmp_path: Path, kind: str
) -> None:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    filled(directory, 3)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (
        object_of(directory, 3, block(3)),
        generations.generation_path(directory, 3),
        directory / "CURRENT",
    ):
        content = path.read_bytes()
        path.unlink()
        (elsewhere / path.name).write_bytes(content)
        put_instead = {
            "link": lambda path=path: path.symlink_to(elsewhere / path.name),
            "fifo": lambda path=path: os.mkfifo(path),
            "folder": path.mkdir,
            "device": lambda path=path: path.symlink_to("/dev/zero"),
        }
        put_instead[kind]()
        heard: list[str] = []
        check(reopened(directory, heard), 3 if path.name == "CURRENT" else 2)
        assert heard
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(content)
    check(reopened(directory), 3)


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_the_same_work_done_again_takes_the_place_of_what_is_no_regular_file(
    tmp_path: Path, kind: str
) -> None:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    filled(directory, 3)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for path in (object_of(directory, 3, block(3)), directory / "CURRENT"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
            (path / "inside").write_text("precious")
        else:
            os.mkfifo(path) if kind == "fifo" else path.symlink_to(precious)
    store = reopened(directory)
    store.put(block(3), tensors(3))
    store.remember("latest", 3)
    store.commit()
    heard: list[str] = []
    check(reopened(directory, heard), 3)
    assert not heard
    assert precious.read_text() == "precious"
    assert len(list(directory.rglob("inside"))) == (2 if kind == "folder" else 0)


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/objects"])
def test_folders_that_are_links_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    filled(directory, 3)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    with pytest.raises(PreflightError, match=r"\ba link\b") as caught:
        reopened(directory)
    assert caught.value.where == str(directory / "objects")
    generations.prune(directory, keep=1)
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before


def test_a_run_that_was_deleted_is_not_made_anew(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"
    directory.mkdir(parents=True)
    store = filled(directory, 2)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(PreflightError):
        store.put(block(3), tensors(3))
    with pytest.raises(PreflightError):
        store.commit()
    with pytest.raises(PreflightError):
        reopened(directory)
    assert not (tmp_path / "run").exists()


# -- checkpoints of the version before -----------------------------------------------------------------


def as_schema_2(directory: Path) -> None:
    """Rewrite a store as the version before wrote it."""
    for ref in generations.candidates(directory):
        made = replace(generations.read(directory, ref), schema=2)
        (directory / ref.name).unlink()
        (directory / f"generation-{ref.number:06d}.json").write_bytes(made.encode())
    (directory / "CURRENT").write_text(f"{generations.highest(directory)}\n")


def old(directory: Path, count: int) -> None:
    store = CheckpointStore(directory, IDENTITY)
    for number in range(1, count + 1):
        store.put(block(number), tensors(number))
        store.commit()
    as_schema_2(directory)


def blocks_in(store: CheckpointStore) -> int:
    return sum(block(number) in store for number in range(1, 10))


def test_a_checkpoint_of_the_version_before_is_read_and_upgraded_by_the_next_commit(tmp_path: Path) -> None:
    old(tmp_path, 3)
    heard: list[str] = []
    store = CheckpointStore(tmp_path, {**IDENTITY, "tokenizer": "c" * 64}, on_damage=heard.append)
    assert (blocks_in(store), heard) == (3, [])
    store.put(block(4), tensors(4))
    store.commit()
    assert generations.read_generation(tmp_path, 4).identity["tokenizer"] == "c" * 64
    DAMAGES["truncated"](generations.generation_path(tmp_path, 4))
    assert blocks_in(CheckpointStore(tmp_path, {**IDENTITY, "tokenizer": "c" * 64})) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 3},
        {"generation": 2},
        {"entries": {"black-000": "0" * 64}},
        {"entries": {"block-001": "0" * 64}},
        {"entries": {"block-000": 3}},
        {"facts": {"e2e_qp_done": True}},
        {"facts": {"e2e_qp_donf": True}},
        {"facts": {"training": {}}},
        {"facts": {"halvings-full": [[1]]}},
        {"facts": {"block_ap_micro_batch": 0}},
        {"identity": {**IDENTITY, "model": "b" * 64}},
        {"identity": {**IDENTITY, "modfl": "a" * 64}},
        {"something": 1},
    ],
)
def test_what_does_not_fit_in_a_checkpoint_of_the_version_before_falls_back(
    tmp_path: Path, change: dict[str, object]
) -> None:
    old(tmp_path, 3)
    path = generations.generation_path(tmp_path, 3)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    heard: list[str] = []
    assert blocks_in(reopened(tmp_path, heard)) == 2
    assert "generation 3 is damaged" in heard[0]


def test_another_model_is_refused_in_a_checkpoint_of_the_version_before(tmp_path: Path) -> None:
    old(tmp_path, 3)
    with pytest.raises(IdentityError) as caught:
        CheckpointStore(tmp_path, {**IDENTITY, "model": "c" * 64})
    assert caught.value.where == "model"
    with pytest.raises(IdentityError) as caught:
        CheckpointStore(tmp_path, {**IDENTITY, "grid.new": "1"})
    assert caught.value.where == "grid.new"


def test_damage_while_the_run_uses_it_is_an_error_and_not_garbage(tmp_path: Path) -> None:
    store = filled(tmp_path, 2)
    DAMAGES["a flipped bit"](object_of(tmp_path, 2, block(2)))
    with pytest.raises(EqatError, match="changed while the run was using it"):
        store.get(block(2))
    check_only = store.get(block(1))
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


def test_a_checkpoint_of_the_first_schema_is_refused_by_that_name(tmp_path: Path) -> None:
    (tmp_path / "generation-000001.json").write_text('{"schema": 1, "generation": 1}')
    (tmp_path / "CURRENT").write_text("1\n")
    with pytest.raises(EqatError, match=r"does not read \(schema 1\)") as caught:
        CheckpointStore(tmp_path, {})
    assert caught.value.exit_code == 8


def test_a_checkpoint_of_another_schema_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    made = replace(generations.read_generation(tmp_path, 1), schema=99)
    generations.publish(tmp_path, made)
    with pytest.raises(IdentityError, match="99"):
        reopened(tmp_path)


# -- kills ---------------------------------------------------------------------------------------------


def commit_third(directory: Path) -> None:
    store = reopened(directory)
    store.put(block(3), tensors(3))
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
    owners, name = ([os], call) if call != "write" else ([objects], "atomic_write")
    real = getattr(owners[0], name)
    calls = 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == n:
            if call == "write":
                path, pieces = Path(str(args[0])), args[1]
                data = pieces if isinstance(pieces, bytes) else b"".join(pieces)  # type: ignore[call-overload]
                path.with_name(f".{path.name}.{os.getpid()}.0123abcd.tmp").write_bytes(data[: len(data) // 2])
            os._exit(9)
        return real(*args, **kwargs)

    for owner in owners:
        setattr(owner, name, counted)


def test_a_failed_write_is_reported_and_loses_nothing(tmp_path: Path) -> None:
    store = filled(tmp_path, 2)
    objects = tmp_path / "objects"
    objects.rename(tmp_path / "elsewhere")
    objects.write_text("in the way")
    with pytest.raises(PreflightError, match="cannot be written"):
        store.put(block(3), tensors(3))
    objects.unlink()
    (tmp_path / "elsewhere").rename(objects)
    check(reopened(tmp_path), 2)


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="cannot be written"):
        CheckpointStore(tmp_path / "file" / "checkpoints", IDENTITY)
