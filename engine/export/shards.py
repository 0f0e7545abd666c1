"""Writing safetensors files while the tensors are still being made.

A safetensors file is ``u64 header length | JSON header | tensor bytes``. The header comes first and holds
every offset, so the usual writers collect all tensors of a file before they write a byte: 4 GiB of host
memory for a 4 GiB shard. :class:`ShardWriter` instead reserves room for the header (the format allows it
to be padded with spaces), appends each tensor's bytes as it arrives, and fills the header in when the
shard is closed. Saving a model costs the memory of one tensor.

Rules of the format that decide the shape of this code:

- The tensor bytes must be covered without holes, so nothing can be padded. Readers view a tensor in place,
  which needs its offset to be a multiple of its element size. Tensors whose size is not a multiple of 8
  bytes (rare, small) therefore wait in memory and go to the end of the shard, widest elements first.
- Shards are named ``model-00001-of-00003.safetensors`` and the total is known only at the end: files are
  written under a number and renamed by :meth:`ShardWriter.close`. A single shard is ``model.safetensors``
  without an index, which is what every loader expects of a small model.

The same tensors in the same order give the same bytes: no time, no path, no random order gets in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from engine.architecture.headers import ALIGNMENT, INDEX_NAME, ITEM_BITS, SINGLE_NAME
from engine.checkpoints.tensorfile import tensor_bytes
from engine.models.weights import TYPE_NAMES


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write readable JSON with the keys in the order given, so equal content gives equal bytes."""
    try:
        data = json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        data = json.dumps(value, indent=2).encode()
    write_durably(path, data + b"\n")


class _Waiting(NamedTuple):
    name: str
    type: str
    shape: tuple[int, ...]
    data: Tensor

    @property
    def order(self) -> tuple[int, str]:
        return -ITEM_BITS[self.type], self.name


@dataclass
class _OpenShard:
    path: Path
    file: BinaryIO
    header: dict[str, Any] = field(default_factory=dict)
    offset: int = 0
    size: int = 0
    waiting: list[_Waiting] = field(default_factory=list)


class ShardWriter:
    """Appends tensors to safetensors files of at most ``shard_bytes`` each (one tensor may be larger)."""

    def __init__(
        self, directory: Path, *, shard_bytes: int, header_bytes: int, container: str = "pt"
    ) -> None:
        """``container`` is what the header calls the file's format."""
        self.directory = directory
        self.container = container
        self.shard_bytes = shard_bytes
        self.header_bytes = header_bytes
        self._open: _OpenShard | None = None
        self._finished: list[Path] = []
        self._shard_of: dict[str, int] = {}
        self.tensor_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; starts the next shard when this one would grow past its limit."""
        self.add_as(name, TYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor)

    def add_as(self, name: str, type_name: str, shape: tuple[int, ...], data: Tensor) -> None:
        """Append a tensor whose bytes are those of ``data``; torch need not know its type."""
        if name in self._shard_of:
            raise ValueError(f"tensor {name} is written twice")
        size = data.numel() * data.element_size()
        if self._open is not None and self._open.size and self._open.size + size > self.shard_bytes:
            self._finish_shard()
        shard = self._open or self._start_shard()
        shard.size += size
        self.tensor_bytes += size
        self._shard_of[name] = len(self._finished)
        if size % ALIGNMENT:
            shard.waiting.append(_Waiting(name, type_name, shape, data.detach().cpu().clone()))
        else:
            self._append(shard, name, type_name, shape, data)

    def close(self) -> list[Path]:
        """Finish the last shard, give the files their final names, write the index; returns the files."""
        if self._open is not None:
            self._finish_shard()
        count = len(self._finished)
        if count == 1:
            final = [self.directory / SINGLE_NAME]
        else:
            final = [self.directory / f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for written, path in zip(self._finished, final, strict=True):
            os.replace(written, path)
        if count > 1:
            weight_map = {name: final[self._shard_of[name]].name for name in sorted(self._shard_of)}
            index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": weight_map}
            write_json(self.directory / INDEX_NAME, index)
        return final

    def abandon(self) -> None:
        """Close the open file without finishing it; the caller removes the directory."""
        if self._open is not None:
            with suppress(OSError):  # closing writes what is buffered, which a full disk refuses once more
                self._open.file.close()
            self._open = None

    def _start_shard(self) -> _OpenShard:
        path = self.directory / f"model-{len(self._finished) + 1:05d}.safetensors.writing"
        shard = _OpenShard(path=path, file=path.open("wb"))
        shard.header["__metadata__"] = {"format": self.container}
        shard.file.write(bytes(8 + self.header_bytes))
        self._open = shard
        return shard

    def _append(
        self, shard: _OpenShard, name: str, type_name: str, shape: tuple[int, ...], data: Tensor
    ) -> None:
        content = tensor_bytes(data)
        end = shard.offset + content.nbytes
        shard.header[name] = {
            "dtype": type_name,
            "shape": list(shape),
            "data_offsets": [shard.offset, end],
        }
        shard.file.write(content)
        shard.offset = end

    def _finish_shard(self) -> None:
        shard = self._open
        assert shard is not None
        for waiting in sorted(shard.waiting, key=lambda each: each.order):
            self._append(shard, *waiting)
        header = json.dumps(shard.header, separators=(",", ":")).encode()
        if len(header) > self.header_bytes:
            shard.file.close()
            raise ValueError(f"{len(header)} bytes of header do not fit the {self.header_bytes} reserved")
        shard.file.seek(0)
        shard.file.write(self.header_bytes.to_bytes(8, "little") + header.ljust(self.header_bytes, b" "))
        shard.file.flush()
        os.fsync(shard.file.fileno())
        shard.file.close()
        self._finished.append(shard.path)
        self._open = None
