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
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

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


class TensorInfo(msgspec.Struct, frozen=True):
    """Shape, stored type, stored size and place of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    start: int = 0
    """First byte, counted from the beginning of the file."""

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


def safetensors_tensors(folder: ModelFolder) -> dict[str, TensorInfo]:
    """All tensors of the safetensors checkpoint in a folder; empty when there is none."""
    tensors: dict[str, TensorInfo] = {}
    for file in safetensors_files(folder):
        tensors.update(safetensors_header(file))
    return tensors


def safetensors_files(folder: ModelFolder) -> list[StampedFile]:
    """The shards an index lists, or the single file; a listed shard that is missing is an error."""
    if INDEX_NAME in folder:
        names = sorted(set(read_index(folder.files[INDEX_NAME]).values()))
        return [shard(folder, name, len(names)) for name in names]
    if SINGLE_NAME in folder:
        return [folder.files[SINGLE_NAME]]
    return [folder.files[name] for name in folder.named("*.safetensors")]


def shard(folder: ModelFolder, name: str, listed: int) -> StampedFile:
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
