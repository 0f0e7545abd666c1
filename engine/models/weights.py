"""Reading one tensor at a time out of a safetensors checkpoint.

Where a tensor lies is what :mod:`engine.architecture.headers` found in the header of its file. Reading it
directly buys four things a memory map does not give:

* every tensor lies in memory of its own, which goes back when the tensor does; mapped pages would be
  counted as ours for as long as the file stays open;
* a truncated or damaged file is found when the model is opened, from the header alone, and not hours
  later as a bus error inside the block that happens to need the missing bytes;
* a file that is replaced or rewritten while a run works is noticed at its next tensor, not in the result;
* between two blocks nothing is held except the parsed headers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.architecture.headers import (
    INDEX_NAME,
    SINGLE_NAME,
    TensorInfo,
    damaged,
    read_index,
    safetensors_header,
    shard,
)
from engine.architecture.model_folder import ModelFolder
from engine.errors import PreflightError
from engine.system.guarded import bad_file
from engine.system.stamps import StampedFile

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

    def files(self) -> list[StampedFile]:
        """Files the weights are read from; empty when they are made up."""
        ...

    def inventory(self) -> list[str]:
        """One line a stored tensor: name, type, shape and place; part of the model's identity."""
        ...


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: byte range ``[start, end)`` counted from the beginning of the file."""

    file: StampedFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsReader:
    """A directory's ``model.safetensors``, or the shards that its index file lists."""

    def __init__(self, directory: Path, folder: ModelFolder | None = None) -> None:
        """``folder`` is the directory as it was judged, where it was."""
        self.directory = directory
        self._entries: dict[str, TensorEntry] = {}
        folder = folder or ModelFolder.judge(directory)
        for name, expected in _checkpoint_files(folder).items():
            file = folder.files[name]
            entries = _entries(file)
            missing = sorted(set(expected) - set(entries)) if expected is not None else []
            if missing:
                raise PreflightError(
                    f"the index lists tensor {missing[0]!r} in this file, but the file does not hold it",
                    where=str(file.path),
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
        return str(self._entry(name).file.path)

    def files(self) -> list[StampedFile]:
        files = {entry.file.path: entry.file for entry in self._entries.values()}
        return [files[path] for path in sorted(files)]

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


def read_exactly(file: StampedFile, start: int, into: Tensor) -> None:
    """Fill a flat uint8 tensor with the file's bytes from ``start`` on.

    Raises:
        IdentityError: when it is no longer the file that was opened.
        BadFile: when it cannot be read.
    """
    view = memoryview(into.numpy().data)
    try:
        with file.opened() as stream:
            done = 0
            while done < len(view):
                count = os.preadv(stream.fileno(), [view[done : done + (1 << 30)]], start + done)
                if count == 0:
                    raise damaged(file, f"ends {len(view) - done} bytes before the tensor does")
                done += count
    except OSError as error:
        raise bad_file(error, file.path) from error


def _entries(file: StampedFile) -> dict[str, TensorEntry]:
    """The tensor table of one safetensors file, checked against the file's size."""
    return {name: _entry(file, info) for name, info in safetensors_header(file).items()}


def _entry(file: StampedFile, info: TensorInfo) -> TensorEntry:
    if info.dtype not in DTYPES:
        raise PreflightError(
            f"tensors of dtype {info.dtype[:80]} are not supported",
            where=str(file.path),
            hint="use the model's original float16, bfloat16 or float32 checkpoint",
        )
    return TensorEntry(file, DTYPES[info.dtype], info.shape, info.start, info.start + info.nbytes)


def _checkpoint_files(folder: ModelFolder) -> dict[str, list[str] | None]:
    """Names of the files to read, each with the tensors that the index promises in it (None without one)."""
    if INDEX_NAME in folder:
        shards: dict[str, list[str] | None] = {}
        for name, file in read_index(folder.files[INDEX_NAME]).items():
            names = shards.setdefault(file, [])
            assert names is not None
            names.append(name)
        for file in sorted(shards):
            shard(folder, file, len(shards))
        return shards
    if SINGLE_NAME in folder:
        return {SINGLE_NAME: None}
    others = folder.named("*.safetensors")
    if len(others) == 1:
        return {others[0]: None}
    raise _no_weights(folder.path, others)


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

    def files(self) -> list[StampedFile]:
        return self._reader.files()

    def inventory(self) -> list[str]:
        return self._reader.inventory()


def match_names(reader: WeightReader, wanted: Iterable[str]) -> WeightReader:
    """The reader under which most of the wanted parameter names are found."""
    names = list(wanted)
    readers = [RenamedReader(reader, rules) if rules else reader for rules in RENAMINGS]
    return max(readers, key=lambda candidate: sum(name in candidate for name in names))
