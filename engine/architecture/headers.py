"""What a checkpoint file says about itself: tensor names, shapes and types, without reading a weight.

A safetensors file is eight bytes of header length, little-endian, then as many bytes of JSON, name -> {dtype,
shape, data_offsets}, then the tensors. Its header is read here and nowhere else, by hand, from the beginning
of the file: ``eqat plan`` answers in well under a second and needs neither torch nor ``safetensors``, and the
engine (:mod:`engine.models.weights`) reads tensors at the very places that were checked here. GGUF files have
:mod:`engine.architecture.gguf_header`.

Every way in which a file can be damaged that shows in its header (a length beyond the end of the file, a type
that is none, ranges that do not fit the shapes, data missing at the end, a shard that is not there) is a
PreflightError naming the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from engine.architecture.model_folder import DOWNLOAD_AGAIN, ModelFolder
from engine.errors import PreflightError, first_line
from engine.system.guarded import LARGE, BadFile, bad_file
from engine.system.stamps import StampedFile

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a longer one means that the file is not safetensors at all."""
MOST_DIMENSIONS = 8
LARGEST_DIMENSION = 1 << 40
LONGEST_NAME = 512
"""Characters of a tensor's or a file's name."""
ALIGNMENT = 8
"""The tensors of a file begin at a multiple of this."""
_ENTRY_OVERHEAD = 100  # dtype, shape and offsets of one header entry, written out in JSON

ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that the weights of a model which is not quantized have."""


class TensorInfo(msgspec.Struct, frozen=True):
    """Shape, stored type, stored size and place of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    start: int = 0
    """First byte, counted from the beginning of the file."""
    listed: bool = True
    """Whether the index, where there is one, names it."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


_Size = Annotated[int, Meta(ge=0, lt=LARGEST_DIMENSION)]
_Place = Annotated[int, Meta(ge=0, lt=1 << 62)]


class _Entry(msgspec.Struct, frozen=True):
    """A tensor as the header describes it."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], Meta(max_length=MOST_DIMENSIONS)]
    data_offsets: tuple[_Place, _Place]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class StoredTensor(NamedTuple):
    """A tensor, and the file it lies in."""

    file: StampedFile
    info: TensorInfo


class Checkpoint(msgspec.Struct, frozen=True):
    """What the safetensors files of a folder hold: the one answer to which file a tensor is read from."""

    tensors: dict[str, StoredTensor]
    """By name. With an index, those that it lists, each in the file that it names: another file may hold a
    tensor of the same name."""
    unlisted: dict[str, StoredTensor]
    """What the index's files hold besides. transformers reads them, the last file's where several have one;
    so they are there for a model that needs them, but they belong to nothing else."""

    def find(self, name: str) -> StoredTensor | None:
        """Where a tensor is read from; None where there is none."""
        return self.tensors.get(name) or self.unlisted.get(name)


def checkpoint(folder: ModelFolder) -> Checkpoint:
    """The safetensors checkpoint in a folder; empty when there is none.

    Which files are read is decided as transformers decides it: ``model.safetensors``, else what the index
    lists. A single file of another name is taken, too.

    Raises:
        PreflightError: for a listed file that is missing, or does not hold what is listed; for several files
            without an index.
    """
    if SINGLE_NAME not in folder and INDEX_NAME in folder:
        return _indexed(folder, read_index(folder.files[INDEX_NAME]))
    names = [SINGLE_NAME] if SINGLE_NAME in folder else folder.named("*.safetensors")
    if len(names) > 1:
        raise PreflightError(
            f"{len(names)} safetensors files, but no {INDEX_NAME} that says how they belong together",
            where=str(folder.path),
            hint="download the index file as well",
        )
    files = [folder.files[name] for name in names]
    return Checkpoint(
        {name: StoredTensor(file, info) for file in files for name, info in safetensors_header(file).items()},
        {},
    )


def _indexed(folder: ModelFolder, weight_map: Mapping[str, str]) -> Checkpoint:
    names = sorted(set(weight_map.values()))
    files = [_shard(folder, name, len(names)) for name in names]
    headers = {name: (file, safetensors_header(file)) for name, file in zip(names, files, strict=True)}
    tensors = {}
    for tensor, name in sorted(weight_map.items()):
        file, header = headers[name]
        if tensor not in header:
            raise PreflightError(
                f"the index lists tensor {tensor!r} in this file, but the file does not hold it",
                where=str(file.path),
                hint="download the model again",
            )
        tensors[tensor] = StoredTensor(file, header[tensor])
    unlisted = {
        tensor: StoredTensor(file, msgspec.structs.replace(info, listed=False))
        for file, header in headers.values()
        for tensor, info in header.items()
        if tensor not in weight_map
    }
    return Checkpoint(tensors, unlisted)


def _shard(folder: ModelFolder, name: str, listed: int) -> StampedFile:
    """One of the files that an index lists."""
    if name not in folder:
        raise PreflightError(
            f"this shard is missing; the index lists {listed} files",
            where=str(folder.path / name),
            hint="finish the download of the model; a download continues where it was interrupted",
        )
    return folder.files[name]


def read_index(index: StampedFile) -> dict[str, str]:
    """``weight_map`` of an index file: tensor name to the name of a file beside it.

    Raises:
        BadFile: for anything else.
    """
    content = index.read(LARGE)
    try:
        found = msgspec.json.decode(content, type=_Index).weight_map
    except Exception as error:  # whatever a parser raises; guarded.py says why
        raise BadFile(
            f"the index of the weight files is damaged: {first_line(error, 200)}",
            where=str(index.path),
            hint=DOWNLOAD_AGAIN,
        ) from error
    for name in found:
        if not is_name(name):
            raise BadFile(
                f"the index of the weight files is damaged: {name[:80]!r} is no name of a tensor",
                where=str(index.path),
                hint=DOWNLOAD_AGAIN,
            )
    for name in set(found.values()):
        if not is_name(name) or Path(name).name != name or not name.endswith(".safetensors"):
            raise BadFile(
                f"the index names {name[:200]!r}, which is no safetensors file in this folder but outside",
                where=str(index.path),
                hint=DOWNLOAD_AGAIN,
            )
    return found


def safetensors_header(file: StampedFile) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of one file, checked against the length of the file.

    Raises:
        BadFile: naming the file.
        IdentityError: when the file is another one than that which was stamped.
    """
    text = _header_text(file)
    begin = 8 + len(text)
    try:
        described = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        described.pop("__metadata__", None)
        tensors = {name: _info(name, entry, begin) for name, entry in described.items()}
    except BadFile:
        raise
    except Exception as error:  # whatever a parser raises; guarded.py says why
        raise damaged(file, f"has a damaged header: {first_line(error, 200)}") from error
    end = max((info.start + info.nbytes for info in tensors.values()), default=begin)
    if end > file.size:
        raise damaged(file, f"is truncated: {file.size} bytes instead of {end}")
    return tensors


def _header_text(file: StampedFile) -> bytes:
    try:
        with file.opened() as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if head.startswith(b"version "):
                raise damaged(file, "is a Git LFS pointer, not the weights", "run `git lfs pull`")
            if len(head) < 8 or length > min(MAX_HEADER_BYTES, file.size - 8):
                raise damaged(file, "is empty, cut off or damaged: its header does not fit into it")
            return stream.read(length)
    except OSError as error:
        raise bad_file(error, file.path) from error


def header_room(names: Iterable[str]) -> int:
    """Bytes that hold the header of a file containing any of the tensors ``names``, a multiple of 8: what an
    export reserves before it knows where each tensor will lie."""
    room = 64 + sum(len(json.dumps(name)) + _ENTRY_OVERHEAD for name in names)
    return -(-room // ALIGNMENT) * ALIGNMENT


def _info(name: str, raw: msgspec.Raw, begin: int) -> TensorInfo:
    """ValueError where range, shape and type disagree."""
    if not is_name(name):
        raise ValueError(f"{name[:80]!r} is no name of a tensor")
    entry = msgspec.json.decode(raw, type=_Entry)
    start, end = entry.data_offsets
    bits = ITEM_BITS.get(entry.dtype)
    if end < start or (bits is not None and (end - start) * 8 != math.prod(entry.shape) * bits):
        raise ValueError(f"byte range and shape of {name[:200]} disagree")
    return TensorInfo(entry.shape, entry.dtype, end - start, begin + start)


def is_name(name: str) -> bool:
    """Whether a tensor or a file can be called so, and messages can repeat it."""
    return 0 < len(name) <= LONGEST_NAME and name.isprintable()


def damaged(file: StampedFile, what: str, hint: str = DOWNLOAD_AGAIN) -> BadFile:
    return BadFile(f"the weight file {what}", where=str(file.path), hint=hint)
