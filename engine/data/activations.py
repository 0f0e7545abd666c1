"""Where the activations between two blocks live: on the GPU, in pinned host memory, or on disk.

Block-AP keeps two streams of ``[sequences, tokens, hidden]``, one slot a sequence, each read batch by
batch in random order and overwritten in place as the stream moves one block on. For a 7B model and 4096
sequences of 2048 tokens that is 64 GiB *each*, which decides where they can live:

=========  =====================================================  ==========================
kind       holds                                                  a read costs
=========  =====================================================  ==========================
device     everything on the compute device                       a copy on the device
host       everything in host memory, page-locked for a GPU       an asynchronous copy
disk       one batch at a time in host memory, the rest on disk   page cache or disk, a copy
=========  =====================================================  ==========================

All kinds return the same bits. A read is always a copy: what a caller holds never changes under it when
the slot is overwritten.

The whole length of a store's files is reserved up front, so a full disk is an error before the work starts.
They lose their name as soon as they exist; however the process ends, the disk space comes back.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from engine.config.runtime import StoreKind
from engine.errors import EqatError, ExitCode, PreflightError
from engine.system.files import make_folder
from engine.system.guarded import opened_folder

Indices = slice | Sequence[int] | Tensor

_PIECE = 8 << 20
"""Bytes of one read or write of a file."""
_FILES = 8
"""That a store's pieces are dealt out to."""
_DISK_THREADS = 8


def make_store(
    kind: StoreKind,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device | str,
    path: Path | None = None,
    budget_bytes: int | None = None,
) -> ActivationStore:
    """A store of ``shape`` = (sequences, tokens, hidden), its contents undefined until written.

    ``device`` is where reads arrive. ``path`` names the file of a disk store. ``budget_bytes`` is the host
    memory that may be used: a host store that is larger is refused.
    """
    device = torch.device(device)
    if kind == "device":
        return DeviceStore(shape, dtype, device)
    if kind == "host":
        return HostStore(shape, dtype, device, budget_bytes)
    if kind == "disk":
        if path is None:
            raise ValueError("a disk store needs a path")
        return DiskStore(shape, dtype, device, path)
    raise ValueError(f"no activation store of kind {kind!r}")


class ActivationStore(ABC):
    """``[sequences, tokens, hidden]``, read and overwritten by sequence."""

    kind: StoreKind

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"not a (sequences, tokens, hidden) shape: {shape}")
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = device
        self.closed = False

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of the contents."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, indices: Indices) -> Tensor:
        """The sequences at ``indices`` as a new tensor ``[len(indices), tokens, hidden]`` on the device."""
        self._check_open()
        positions = self._positions(indices)
        target = torch.empty((len(positions), *self.shape[1:]), dtype=self.dtype, device=self.device)
        self._read_into(positions, target)
        return target

    def read_into(self, indices: Indices, target: Tensor) -> None:
        """The same into ``target``, in the order of the current stream; the host does not wait for copies."""
        self._check_open()
        self._read_into(self._positions(indices), target)

    def write(self, start: int, tensor: Tensor) -> None:
        """Overwrite the sequences from ``start`` on; ``tensor`` may be on any device and of any dtype."""
        self._check_open()
        if tensor.shape[1:] != self.shape[1:] or start < 0 or start + len(tensor) > len(self):
            raise IndexError(f"{tuple(tensor.shape)} at {start} does not fit into {tuple(self.shape)}")
        self._write(start, tensor.detach())

    def close(self) -> None:
        """Give everything back; the contents are gone. Closing again does nothing."""
        if not self.closed:
            self.closed = True
            self._close()

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # while Python ends, whatever this uses may be gone
            pass

    def _positions(self, indices: Indices) -> Sequence[int]:
        if isinstance(indices, slice):
            return range(len(self))[indices]
        if isinstance(indices, range):
            positions: Sequence[int] = indices
        else:
            positions = indices.tolist() if isinstance(indices, Tensor) else [int(i) for i in indices]
        if any(not 0 <= index < len(self) for index in positions):
            raise IndexError(f"sequences {list(positions)} of {len(self)}")
        return positions

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the activation store is closed")

    @abstractmethod
    def _read_into(self, positions: Sequence[int], target: Tensor) -> None: ...

    @abstractmethod
    def _write(self, start: int, tensor: Tensor) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


class DeviceStore(ActivationStore):
    """One tensor on the compute device."""

    kind = "device"

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        self._data_NTH = _allocate(self, device)

    def _read_into(self, positions: Sequence[int], target: Tensor) -> None:
        _gather(self._data_NTH, positions, target)

    def _write(self, start: int, tensor: Tensor) -> None:
        self._data_NTH[start : start + len(tensor)].copy_(tensor)

    def _close(self) -> None:
        self._data_NTH = torch.empty(0)


class HostStore(ActivationStore):
    """One tensor in host memory, page-locked when the device is a GPU.

    All copies go through the current stream of the device, so a read issued after a write sees it although
    neither waits for the other.
    """

    kind = "host"

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int | None = None,
    ) -> None:
        super().__init__(shape, dtype, device)
        self._pinned = False
        if budget_bytes is not None and self.nbytes > budget_bytes:
            raise PreflightError(
                f"activations of {self.nbytes / 2**30:.2f} GiB exceed the host memory budget of "
                f"{budget_bytes / 2**30:.2f} GiB",
                where="runtime.activation_store = 'host'",
                hint="use 'disk', fewer sequences, or a larger runtime.host_memory_gib",
            )
        self._data_NTH = _allocate(self, torch.device("cpu"))
        if device.type == "cuda":
            self._pin()

    def _pin(self) -> None:
        # torch's own pinned allocator rounds up to a power of two: 65 GiB would take 128
        runtime: Any = torch.cuda.cudart()
        status = int(runtime.cudaHostRegister(self._data_NTH.data_ptr(), self.nbytes, 0))
        if status != 0:
            raise EqatError(
                f"{self.nbytes / 2**30:.2f} GiB of host memory cannot be page-locked (CUDA error {status})",
                exit_code=ExitCode.OUT_OF_MEMORY,
                where="runtime.activation_store = 'host'",
                hint="use 'disk', or raise the limit of locked memory",
            )
        self._pinned = True

    def _read_into(self, positions: Sequence[int], target: Tensor) -> None:
        _gather(self._data_NTH, positions, target)

    def _write(self, start: int, tensor: Tensor) -> None:
        target = self._data_NTH[start : start + len(tensor)]
        if tensor.is_cuda:  # convert first: an asynchronous copy must not change dtype on the host
            target.copy_(tensor.to(self.dtype), non_blocking=self._pinned)
        else:
            self._settle()
            target.copy_(tensor)

    def _settle(self) -> None:
        """Wait for copies under way before the host itself touches the memory."""
        if self._pinned:
            torch.cuda.current_stream(self.device).synchronize()

    def _close(self) -> None:
        if self._pinned:
            torch.cuda.synchronize(self.device)
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self._data_NTH.data_ptr())
            self._pinned = False
        self._data_NTH = torch.empty(0)


class DiskStore(ActivationStore):
    """Nameless files, read and written piece by piece, several at a time.

    They are read with ``pread``: what a memory map touches counts as this process's memory until it is given
    back, and faults in page by page. One thread copies some gigabytes a second from or to the page cache,
    which is too slow for a large block's steps, so the pieces of a batch are copied side by side; and as the
    kernel lets one thread at a time write to a file, pieces that follow each other lie in different files.
    """

    kind = "disk"

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        path: Path,
    ) -> None:
        super().__init__(shape, dtype, device)
        self._row_bytes = self.nbytes // len(self)
        self._where = str(path)
        self._threads = ThreadPoolExecutor(_DISK_THREADS, thread_name_prefix="activations")
        self._descriptors: list[int] = []
        try:
            for length in _stripes(self.nbytes):
                self._descriptors.append(_reserve_file(path, length))
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            raise _disk_error(error, self._where, self.nbytes) from error

    def _read_into(self, positions: Sequence[int], target: Tensor) -> None:
        cuda = target.is_cuda
        rows = torch.empty(target.shape, dtype=self.dtype, pin_memory=True) if cuda else target
        whole = _bytes_of(rows)
        size = self._row_bytes
        pieces = [
            piece
            for place, index in enumerate(positions)
            for piece in self._pieces(whole[place * size : (place + 1) * size], index * size)
        ]
        self._side_by_side(os.preadv, pieces)
        if cuda:
            target.copy_(rows, non_blocking=True)

    def _write(self, start: int, tensor: Tensor) -> None:
        host = tensor.to(device="cpu", dtype=self.dtype).contiguous()
        self._side_by_side(os.pwritev, self._pieces(_bytes_of(host), start * self._row_bytes))

    def _pieces(self, memory: memoryview, start: int) -> Iterator[tuple[memoryview, int, int]]:
        """Parts of ``memory``, whose place in the contents begins at ``start``; the file of each, and where
        in that."""
        while memory:
            number, inside = divmod(start, _PIECE)
            count = min(len(memory), _PIECE - inside)
            turn, file = divmod(number, _FILES)
            yield memory[:count], self._descriptors[file], turn * _PIECE + inside
            memory, start = memory[count:], start + count

    def _side_by_side(
        self,
        transfer: Callable[[int, list[memoryview], int], int],
        pieces: Iterable[tuple[memoryview, int, int]],
    ) -> None:
        def whole_piece(piece: tuple[memoryview, int, int]) -> None:
            memory, descriptor, offset = piece
            while memory:
                count = transfer(descriptor, [memory], offset)
                memory, offset = memory[count:], offset + count

        try:
            list(self._threads.map(whole_piece, pieces))
        except OSError as error:
            raise _disk_error(error, self._where, self.nbytes) from error

    def _close(self) -> None:
        self._threads.shutdown()
        for descriptor in self._descriptors:
            os.close(descriptor)


def _stripes(length: int) -> list[int]:
    """Bytes in each of a store's files, of which a small one has fewer."""
    pieces = -(-length // _PIECE)
    stripes = [len(range(file, pieces, _FILES)) * _PIECE for file in range(min(pieces, _FILES))]
    stripes[(pieces - 1) % _FILES] -= pieces * _PIECE - length
    return stripes


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the host."""
    raw: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def _allocate(store: ActivationStore, device: torch.device) -> Tensor:
    try:
        return torch.empty(store.shape, dtype=store.dtype, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a plain one
        if "memory" not in str(error):
            raise
        raise EqatError(
            f"no room for {store.nbytes / 2**30:.2f} GiB of activations on {device}",
            exit_code=ExitCode.OUT_OF_MEMORY,
            where=f"runtime.activation_store = {store.kind!r}",
            hint="use 'host' or 'disk', or fewer sequences",
        ) from None


def _gather(data_NTH: Tensor, positions: Sequence[int], target: Tensor) -> None:
    """Rows of a tensor: one copy, and none of it staged.

    Row by row where they do not follow each other, because a tensor of positions would have to reach the
    device first, and the host would wait.
    """
    first = positions[0] if positions else 0
    if list(positions) == list(range(first, first + len(positions))):
        target.copy_(data_NTH[first : first + len(positions)], non_blocking=True)
        return
    for place, index in enumerate(positions):
        target[place].copy_(data_NTH[index], non_blocking=True)


def _reserve_file(path: Path, length: int) -> int:
    """A nameless file with all of its blocks allocated; its descriptor.

    What has its name already (a link, a FIFO, another name of somebody's file) is removed, never opened.
    """
    # Not the folders above it: a run that was deleted is not made anew.
    make_folder(path.parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with opened_folder(path.parent) as folder:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path.name, dir_fd=folder)
        descriptor = os.open(path.name, flags, 0o600, dir_fd=folder)
        os.unlink(path.name, dir_fd=folder)
    try:
        os.posix_fallocate(descriptor, 0, length)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _disk_error(error: OSError, where: str, length: int) -> EqatError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return EqatError(
        f"no room for {length / 2**30:.2f} GiB of activations on this disk"
        if full
        else f"the activation file cannot be used: {error.strerror or error}",
        exit_code=ExitCode.DISK_FULL if full else ExitCode.PREFLIGHT,
        where=where,
        hint="free some space or use a run directory on another disk" if full else "check the run directory",
    )
