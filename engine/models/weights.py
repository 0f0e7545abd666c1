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
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.architecture.headers import (
    INDEX_NAME,
    SINGLE_NAME,
    StoredTensor,
    checkpoint,
    damaged,
)
from engine.architecture.leftovers import why_no_weight
from engine.architecture.model_folder import ModelFolder
from engine.architecture.refusals import missing_tensor, refuse_stored_type
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
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Types that a tensor can be read in. A file may hold others (numbers of four and six bits): they are
refused where a model needs them, and carried along as bytes where none does."""
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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


class SafetensorsReader:
    """A directory's safetensors checkpoint (:func:`engine.architecture.headers.checkpoint`)."""

    def __init__(self, directory: Path, folder: ModelFolder | None = None) -> None:
        """``folder`` is the directory as it was judged, where it was."""
        self.directory = directory
        self._checkpoint = checkpoint(folder or ModelFolder.judge(directory))
        if not self._checkpoint.tensors:
            raise _no_weights(directory)

    def names(self) -> list[str]:
        return sorted(self._checkpoint.tensors)

    def unlisted(self) -> list[str]:
        """Names of what lies in the files, but not in their index: found, but part of nothing, unless a model
        needs it."""
        return sorted(self._checkpoint.unlisted)

    def __contains__(self, name: str) -> bool:
        return self._checkpoint.find(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).info.shape

    def dtype(self, name: str) -> torch.dtype:
        stored = self._entry(name).info.dtype
        if stored not in DTYPES:
            refuse_stored_type(name, stored, self.where(name))
        return DTYPES[stored]

    def nbytes(self, name: str) -> int:
        return self._entry(name).info.nbytes

    def stored_type(self, name: str) -> str:
        """Its type as the file calls it."""
        return self._entry(name).info.dtype

    def where(self, name: str) -> str:
        return str(self._entry(name).file.path)

    def files(self) -> list[StampedFile]:
        files = {entry.file.path: entry.file for entry in self._all().values()}
        return [files[path] for path in sorted(files)]

    def inventory(self) -> list[str]:
        return [
            f"{name} {DTYPES.get(entry.info.dtype, entry.info.dtype)} {entry.info.shape} {entry.info.start}"
            for name, entry in sorted(self._all().items())
        ]

    def load(self, name: str) -> Tensor:
        return self.raw(name).view(self.dtype(name)).reshape(self.shape(name))

    def raw(self, name: str) -> Tensor:
        """Its bytes as they are in the file, uint8 ``[nbytes]``."""
        entry = self._entry(name)
        raw = torch.empty(entry.info.nbytes, dtype=torch.uint8)
        read_exactly(entry.file, entry.info.start, raw)
        return raw

    def why_left(self, name: str, place: str) -> str:
        """Why a stored tensor that no parameter is read from is left behind, where transformers would look
        for it at ``place``; empty where it is carried along."""
        return why_no_weight(place, self.shape(name))

    def _all(self) -> Mapping[str, StoredTensor]:
        return {**self._checkpoint.unlisted, **self._checkpoint.tensors}

    def _entry(self, name: str) -> StoredTensor:
        entry = self._checkpoint.find(name)
        if entry is None:
            raise missing_tensor(name, str(self.directory))
        return entry


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


def _no_weights(directory: Path) -> PreflightError:
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


class NamedReader:
    """A checkpoint whose tensors have other names than the model's."""

    def __init__(self, reader: WeightReader, stored: Mapping[str, str]) -> None:
        """``stored`` has the model's names of all tensors, and those of the checkpoint."""
        self._reader = reader
        self._names = stored

    def names(self) -> list[str]:
        return self._reader.names()

    def __contains__(self, name: str) -> bool:
        return name in self._names and self._names[name] in self._reader

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

    def _stored(self, name: str) -> str:
        return self._names.get(name, name)
