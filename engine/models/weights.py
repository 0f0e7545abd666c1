"""Reading one tensor at a time out of a safetensors checkpoint.

A safetensors file is eight bytes of header length, a JSON header that gives every tensor's dtype, shape
and byte range, and then the bytes. That is little enough to read directly, and reading it directly buys
three things a memory map does not give:

* every tensor lies in memory of its own, which goes back when the tensor does; mapped pages would be
  counted as ours for as long as the file stays open;
* a truncated or damaged file is found when the model is opened, from the header alone, and not hours
  later as a bus error inside the block that happens to need the missing bytes;
* between two blocks nothing is held except the parsed headers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.run.errors import PreflightError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a longer one means that the file is not safetensors at all."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class WeightReader(Protocol):
    """Single tensors of a checkpoint, by the names that transformers gives a model's parameters."""

    def names(self) -> list[str]:
        """Names as the checkpoint stores them, sorted."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether :meth:`load` would find the tensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that :meth:`load` returns."""
        ...

    def load(self, name: str) -> Tensor:
        """The tensor in memory of its own, on the CPU, in :meth:`dtype`."""
        ...

    def where(self, name: str) -> str:
        """File that holds the tensor, for messages."""
        ...

    def files(self) -> list[Path]:
        """Files the weights are read from; empty when they are made up."""
        ...

    def inventory(self) -> list[str]:
        """One line a stored tensor: name, type, shape and place; part of the model's identity."""
        ...


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: byte range ``[start, end)`` counted from the beginning of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsReader:
    """A directory's ``model.safetensors``, or the shards that its index file lists."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._entries: dict[str, TensorEntry] = {}
        for file, expected in _checkpoint_files(directory).items():
            entries = read_header(file)
            missing = sorted(set(expected) - set(entries)) if expected is not None else []
            if missing:
                raise PreflightError(
                    f"the index lists tensor {missing[0]!r} in this file, but the file does not hold it",
                    where=str(file),
                    hint="download the model again",
                )
            self._entries.update(entries)

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def where(self, name: str) -> str:
        return str(self._entry(name).file)

    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self._entries.values()})

    def inventory(self) -> list[str]:
        return [
            f"{name} {entry.dtype} {entry.shape} {entry.start}"
            for name, entry in sorted(self._entries.items())
        ]

    def load(self, name: str) -> Tensor:
        entry = self._entry(name)
        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        read_exactly(entry.file, entry.start, raw)
        return raw.view(entry.dtype).reshape(entry.shape)

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise PreflightError(
                f"tensor {name!r} is missing from the checkpoint",
                where=str(self.directory),
                hint="download the model again, or check that config.json belongs to these weights",
            ) from None


def read_exactly(file: Path, start: int, into: Tensor) -> None:
    """Fill a flat uint8 tensor with the file's bytes from ``start`` on."""
    view = memoryview(into.numpy().data)
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise PreflightError(f"cannot be read: {error.strerror}", where=str(file)) from error
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done : done + (1 << 30)]], start + done)
            if count == 0:
                raise _damaged(file, f"ends {len(view) - done} bytes before the tensor does")
            done += count
    except OSError as error:
        raise PreflightError(f"cannot be read: {error.strerror}", where=str(file)) from error
    finally:
        os.close(descriptor)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensor table of one safetensors file, checked against the file's size."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if head.startswith(b"version "):
                raise _damaged(file, "is a Git LFS pointer, not the weights", "run `git lfs pull`")
            if len(head) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(file, "is not a complete safetensors file: its header does not fit into it")
            text = stream.read(length)
    except OSError as error:
        raise PreflightError(f"cannot be read: {error.strerror}", where=str(file)) from error
    try:
        header = json.loads(text)
        entries = {
            name: _entry(file, description, 8 + length)
            for name, description in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, "has a damaged header") from error
    last = max((entry.end for entry in entries.values()), default=8 + length)
    if last > size:
        raise _damaged(file, f"is truncated: {size} bytes instead of {last}")
    return entries


def _entry(file: Path, description: Mapping[str, Any], base: int) -> TensorEntry:
    name = description["dtype"]
    if name not in DTYPES:
        raise PreflightError(
            f"tensors of dtype {name} are not supported",
            where=str(file),
            hint="use the model's original float16, bfloat16 or float32 checkpoint",
        )
    dtype = DTYPES[name]
    shape = tuple(int(n) for n in description["shape"])
    start, end = (int(n) for n in description["data_offsets"])
    if start < 0 or min(shape, default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("byte range and shape disagree")
    return TensorEntry(file, dtype, shape, base + start, base + end)


def _damaged(file: Path, what: str, hint: str = "download the file again") -> PreflightError:
    return PreflightError(f"the weight file {what}", where=str(file), hint=hint)


def _checkpoint_files(directory: Path) -> dict[Path, list[str] | None]:
    """Files to read, each with the tensors that the index promises in it (None without an index)."""
    index = directory / INDEX_NAME
    if index.is_file():
        shards: dict[Path, list[str] | None] = {}
        for name, shard in read_index(index).items():
            names = shards.setdefault(directory / shard, [])
            assert names is not None
            names.append(name)
        for shard_path in shards:
            if not shard_path.is_file():
                raise PreflightError(
                    f"shard {shard_path.name} is missing; the index lists {len(shards)} files",
                    where=str(directory),
                    hint="download the model again; a download continues where it was interrupted",
                )
        return shards
    if (directory / SINGLE_NAME).is_file():
        return {directory / SINGLE_NAME: None}
    others = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    if len(others) == 1:
        return {others[0]: None}
    raise _no_weights(directory, [path.name for path in others])


def read_index(index: Path) -> dict[str, str]:
    """``weight_map`` of an index file: tensor name to shard file name."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        result = {str(name): str(shard) for name, shard in weight_map.items()}
    except OSError as error:
        raise PreflightError(f"cannot be read: {error.strerror}", where=str(index)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PreflightError(
            "the index of the weight files is damaged", where=str(index), hint="download the file again"
        ) from error
    for shard in result.values():
        if Path(shard).name != shard:
            raise PreflightError(f"the index names a file outside its folder: {shard!r}", where=str(index))
    return result


def _no_weights(directory: Path, safetensors: list[str]) -> PreflightError:
    if safetensors:
        return PreflightError(
            f"{len(safetensors)} safetensors files, but no {INDEX_NAME} that says how they belong together",
            where=str(directory),
            hint="download the index file as well",
        )
    if any(directory.glob("pytorch_model*.bin")) or any(directory.glob("*.pt*")):
        return PreflightError(
            "the weights are PyTorch pickles only, which can run code when they are read; "
            "safetensors weights are needed",
            where=str(directory),
            hint="load the model with transformers once and save it with model.save_pretrained(folder)",
        )
    return PreflightError(
        f"no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there",
        where=str(directory),
        hint="safetensors weights are needed; load a model that has only pytorch_model.bin with transformers "
        "once and save it with model.save_pretrained(folder)",
    )


RENAMINGS: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (("model.", ""), ("transformer.", ""), ("gpt_neox.", "")),
    (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    (("model.", "model.language_model."),),
    (("model.", "model.text_model."),),
)
"""Ways in which a checkpoint's names differ from the model's: none; saved without the head; the text
part of a multimodal checkpoint, in the old, the new and a rarer order of words."""


class RenamedReader:
    """A reader whose checkpoint was saved from another wrapper of the same model."""

    def __init__(self, reader: WeightReader, rules: tuple[tuple[str, str], ...]) -> None:
        self._reader = reader
        self._rules = rules

    def _stored(self, name: str) -> str:
        for prefix, stored in self._rules:
            if name.startswith(prefix):
                return stored + name[len(prefix) :]
        return name

    def names(self) -> list[str]:
        return self._reader.names()

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._reader

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._stored(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(self._stored(name))

    def load(self, name: str) -> Tensor:
        return self._reader.load(self._stored(name))

    def where(self, name: str) -> str:
        return self._reader.where(self._stored(name))

    def files(self) -> list[Path]:
        return self._reader.files()

    def inventory(self) -> list[str]:
        return self._reader.inventory()


def match_names(reader: WeightReader, wanted: Iterable[str]) -> WeightReader:
    """The reader under which most of the wanted parameter names are found."""
    names = list(wanted)
    readers = [RenamedReader(reader, rules) if rules else reader for rules in RENAMINGS]
    return max(readers, key=lambda candidate: sum(name in candidate for name in names))
