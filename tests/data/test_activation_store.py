"""The three kinds of store return the same bits; the disk kind does so inside a memory budget."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config.runtime import StoreKind
from engine.data import activations
from engine.data.activations import ActivationStore, make_store
from engine.errors import EqatError, ExitCode, PreflightError

KINDS: tuple[StoreKind, ...] = ("device", "host", "disk")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def store_of(
    kind: StoreKind, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path
) -> ActivationStore:
    return make_store(kind, shape, dtype, "cpu", path=folder / "stream.bin", budget_bytes=1 << 20)


def random_bits(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every bit pattern, infinities and NaNs with payload included."""
    width = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(width)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(limits.min, limits.max, shape, generator=generator, dtype=width).view(dtype)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 9),
    tokens=st.integers(1, 5),
    hidden=st.integers(1, 700),
    piece=st.sampled_from([7, 64, 1000, activations._PIECE]),
    data=st.data(),
)
def test_all_kinds_hold_the_same_bits_under_any_reads_and_writes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    count: int,
    tokens: int,
    hidden: int,
    piece: int,
    data: st.DataObject,
) -> None:
    monkeypatch.setattr(activations, "_PIECE", piece)
    shape = (count, tokens, hidden)
    expected = random_bits(0, shape, dtype)
    stores = [store_of(kind, shape, dtype, tmp_path) for kind in KINDS]
    for store in stores:
        assert store.nbytes == len(bits(expected))
        store.write(0, expected)
    for seed in range(1, 5):
        start = data.draw(st.integers(0, count - 1))
        length = data.draw(st.integers(0, count - start))
        rows = random_bits(seed, (length, tokens, hidden), dtype)
        indices = data.draw(st.lists(st.integers(0, count - 1), max_size=6))
        expected[start : start + length] = rows
        for store in stores:
            store.write(start, rows)
            assert bits(store.read(indices)) == bits(expected[indices])
            assert bits(store.read(torch.tensor(indices, dtype=torch.int64))) == bits(expected[indices])
            assert bits(store.read(slice(start, start + length))) == bits(rows)
    for store in stores:
        assert bits(store.read(slice(None))) == bits(expected)
        store.close()


@pytest.mark.parametrize("kind", KINDS)
def test_stream_can_be_overwritten_in_place_while_earlier_reads_are_held(
    tmp_path: Path, kind: StoreKind
) -> None:
    with store_of(kind, (6, 2, 8), torch.float32, tmp_path) as store:
        store.write(0, torch.arange(96.0).view(6, 2, 8))
        held = store.read(slice(0, 6))
        for start in range(0, 6, 2):  # what moving a stream over a block does
            store.write(start, store.read(slice(start, start + 2)) * 2 + 1)
        assert torch.equal(held, torch.arange(96.0).view(6, 2, 8))
        assert torch.equal(store.read([5, 0]), held[[5, 0]] * 2 + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_writes_convert_and_detach_and_misuse_is_refused(tmp_path: Path, kind: StoreKind) -> None:
    store = store_of(kind, (4, 2, 8), torch.bfloat16, tmp_path)
    values = torch.randn(2, 2, 8, requires_grad=True)
    store.write(2, values.transpose(0, 1).transpose(0, 1))
    assert torch.equal(store.read([2, 3]), values.detach().bfloat16())
    assert not store.read([2]).requires_grad
    assert store.read([]).shape == (0, 2, 8)
    for start, rows in ((3, 2), (-1, 1), (0, 5)):
        with pytest.raises(IndexError):
            store.write(start, torch.zeros(rows, 2, 8))
    with pytest.raises(IndexError):
        store.write(0, torch.zeros(1, 2, 9))
    for indices in ([4], [-1], torch.tensor([0, 4])):
        with pytest.raises(IndexError):
            store.read(indices)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.read([0])


def test_disk_store_leaves_no_file_behind(tmp_path: Path) -> None:
    store = store_of("disk", (4, 2, 8), torch.float32, tmp_path / "made on demand")
    store.write(0, torch.ones(4, 2, 8))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    before = len(os.listdir("/proc/self/fd"))
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_disk_store_makes_its_folder_and_none_above_it(tmp_path: Path) -> None:
    """A run that was deleted under its engine is not made anew."""
    with pytest.raises(EqatError):
        store_of("disk", (4, 2, 8), torch.float32, tmp_path / "deleted" / "cache")
    assert not (tmp_path / "deleted").exists()


def test_a_disk_store_opens_nothing_that_has_its_name_already(tmp_path: Path) -> None:
    """Neither by a link, nor by a second name of the same file; and a FIFO is not waited for."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    name = tmp_path / "stream.bin"
    for put in (
        lambda: name.symlink_to(precious),
        lambda: name.hardlink_to(precious),
        lambda: os.mkfifo(name),
    ):
        put()
        with store_of("disk", (4, 2, 8), torch.float32, tmp_path) as store:
            store.write(0, torch.ones(4, 2, 8))
            assert torch.equal(store.read([3]), torch.ones(1, 2, 8))
        assert precious.read_text() == "precious"
        assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_disk_store_enters_no_folder_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(EqatError) as caught:
        store_of("disk", (4, 2, 8), torch.float32, tmp_path / "link")
    assert caught.value.exit_code == ExitCode.PREFLIGHT
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "real"]


def test_host_store_larger_than_its_budget_is_refused() -> None:
    with pytest.raises(PreflightError, match="budget") as caught:
        make_store("host", (64, 64, 64), torch.float32, "cpu", budget_bytes=1000)
    assert "disk" in caught.value.hint


def test_impossible_amount_of_memory_is_out_of_memory() -> None:
    with pytest.raises(EqatError) as caught:
        make_store("host", (1 << 20, 1 << 15, 1 << 14), torch.float32, "cpu")
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY


# --- the budget ---------------------------------------------------------------------------------------

COUNT, TOKENS, HIDDEN = 320, 256, 2048  # 320 MiB in 16 bits
BUDGET = 48 << 20
OWN_MAPPINGS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
"""Memory that is given back leaves the process: what the heap keeps in fragments is not the store's."""

WORKER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}]
import test_activation_store as promise

def kilobytes(field):
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith(field)).split()[1])

def reset_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return kilobytes("VmRSS")
    except OSError:
        return kilobytes("VmHWM")

promise.exercise("disk", Path(sys.argv[1]), count=8)  # whatever is loaded on first use
base = reset_peak()
digest = promise.exercise("disk", Path(sys.argv[1]))
print(json.dumps({{"peak": (kilobytes("VmHWM") - base) * 1024, "digest": digest}}))
"""


def exercise(kind: Literal["device", "host", "disk"], folder: Path, count: int = COUNT) -> str:
    """Fill, read in random order, overwrite in place, read again; the hash of everything that was read."""
    digest = hashlib.sha256()
    budget = BUDGET if kind == "disk" else None
    with make_store(
        kind, (count, TOKENS, HIDDEN), torch.bfloat16, "cpu", path=folder / "s.bin", budget_bytes=budget
    ) as store:
        for start in range(0, count, 4):
            store.write(start, random_bits(start, (4, TOKENS, HIDDEN), torch.bfloat16))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
        for chosen in order.split(4):
            digest.update(bits(store.read(chosen)))
        for start in range(0, count, 4):
            rows = store.read(slice(start, start + 4))
            store.write(start, rows.view(torch.int16).bitwise_not_().view(torch.bfloat16))
        for chosen in order.flip(0).split(4):
            digest.update(bits(store.read(chosen.tolist())))
    return digest.hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_disk_store_stays_inside_its_budget_and_bit_identical(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    script = WORKER.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), **OWN_MAPPINGS},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["peak"] < BUDGET < COUNT * TOKENS * HIDDEN * 2 / 6
    assert result["digest"] == exercise("host", tmp_path)


# --- a full disk --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def check_full(folder: Path) -> None:
    with pytest.raises(EqatError) as caught:
        store_of("disk", (64, 64, 1024), torch.float32, folder)  # 16 MiB
    assert caught.value.exit_code == ExitCode.DISK_FULL
    assert "disk" in str(caught.value)
    assert list(folder.iterdir()) == []


def test_full_disk_is_found_before_the_work_starts(small_disk: Path) -> None:
    check_full(small_disk)
    with store_of("disk", (8, 64, 1024), torch.float32, small_disk) as store:  # 2 MiB fit
        store.write(0, torch.ones(8, 64, 1024))
        assert torch.equal(store.read([7]), torch.ones(1, 64, 1024))


def test_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        check_full(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_unusable_folder_is_a_preflight_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EqatError) as caught:
        store_of("disk", (4, 2, 8), torch.float32, tmp_path / "file" / "cache")
    assert caught.value.exit_code == ExitCode.PREFLIGHT
    assert os.strerror(errno.ENOTDIR) in str(caught.value) or "File exists" in str(caught.value)


# --- on a GPU -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinds_agree_on_a_gpu(tmp_path: Path, dtype: torch.dtype) -> None:
    shape = (16, 128, 1024)
    expected = random_bits(0, shape, dtype)
    for kind in KINDS:
        with make_store(kind, shape, dtype, "cuda", path=tmp_path / "s.bin") as store:
            store.write(0, expected)
            store.write(3, expected[:5].cuda())
            moved = expected.clone()
            moved[3:8] = expected[:5]
            for indices in ([15, 0, 3, 3], list(range(16))):
                read = store.read(indices)
                assert read.is_cuda
                assert bits(read.cpu()) == bits(moved[indices])
            for start in range(0, 16, 4):  # reads and writes queue up without waiting for each other
                rows = store.read(slice(start, start + 4))
                store.write(start, rows.flip(0))
            blocks = moved.view(4, 4, *shape[1:]).flip(1).reshape(shape)
            assert bits(store.read(slice(None)).cpu()) == bits(blocks)
