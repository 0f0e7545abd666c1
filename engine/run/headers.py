"""What a checkpoint file says about itself: tensor names, shapes and types, without reading a weight.

Two formats, both parsed by hand from a few kilobytes at the start of a file, so that ``eqat plan``
answers in well under a second and needs neither torch nor the ``safetensors`` and ``gguf`` packages.

safetensors  8 bytes little-endian length n, then n bytes of JSON: name -> {dtype, shape, data_offsets}.
GGUF         magic, version, number of tensors, number of key/value pairs; the pairs (typed; the token
             lists are arrays of some 10^5 strings, which are stepped over, not decoded); then one
             record a tensor with its dimensions in reverse order.

Every way in which a file can be damaged that shows in its header (wrong magic, a length beyond the end
of the file, data missing at the end, a shard that is not there) is a PreflightError naming the file.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import msgspec

from engine.run.errors import PreflightError


class TensorInfo(msgspec.Struct, frozen=True):
    """Shape, stored type, stored size and place of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    start: int = 0
    """First byte in the file; only GGUF headers say."""

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


# ---------------------------------------------------------------------------------------- safetensors


def safetensors_tensors(directory: Path) -> dict[str, TensorInfo]:
    """All tensors of the safetensors checkpoint in ``directory``; empty when there is none."""
    tensors: dict[str, TensorInfo] = {}
    for file in safetensors_files(directory):
        tensors.update(read_safetensors_header(file))
    return tensors


def safetensors_files(directory: Path) -> list[Path]:
    """The shards an index lists, or the single file; a listed shard that is missing is an error."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise PreflightError("the shard index is damaged", where=str(index)) from error
        for name in names:
            if not (directory / name).is_file():
                raise PreflightError(
                    "this shard is listed in the index but missing",
                    where=str(directory / name),
                    hint="finish the download of the model",
                )
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    return [single] if single.is_file() else sorted(directory.glob("*.safetensors"))


def read_safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of one file, checked against the length of the file."""

    def damaged(reason: str) -> PreflightError:
        return PreflightError(reason, where=str(file), hint="download or copy this file again")

    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise damaged("the safetensors file is empty or cut off")
        length = int.from_bytes(prefix, "little")
        if length > size - 8:
            raise damaged("the safetensors header is damaged: it is said to be longer than the file")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: TensorInfo(
                    tuple(info["shape"]), info["dtype"], info["data_offsets"][1] - info["data_offsets"][0]
                )
                for name, info in header.items()
            }
            end = max((info["data_offsets"][1] for info in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise damaged("the safetensors header is damaged") from error
    if size < 8 + length + end:
        raise damaged(f"the safetensors file is cut off: {size} bytes instead of {8 + length + end}")
    return tensors


# ----------------------------------------------------------------------------------------------- GGUF

GGML_TYPES: dict[int, tuple[str, int, int]] = {
    # id: (name, weights in a block, bytes of a block)
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    42: ("Q2_0", 64, 18),
}

SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LONGEST_KEPT_ARRAY = 1024
"""Per-layer arrays (head counts, feed-forward lengths) are kept; token scores and types are not."""


class GGUFHeader(msgspec.Struct, frozen=True):
    """Key/value pairs and tensors of a GGUF file."""

    metadata: dict[str, Any]
    """Scalars, strings and short arrays of numbers."""
    array_lengths: dict[str, int]
    """Length of every array, also of those that were stepped over."""
    tensors: dict[str, TensorInfo]
    """Shapes in the usual order: [out, in]."""


def read_gguf_header(file: Path) -> GGUFHeader:
    """Key/value pairs and tensor records of a GGUF file (version 2 or 3, little-endian)."""

    def damaged(reason: str) -> PreflightError:
        return PreflightError(reason, where=str(file), hint="download or copy this file again")

    size = file.stat().st_size
    if size < 24:
        raise damaged("the GGUF file is empty or cut off")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        if view[:4] != b"GGUF":
            raise damaged("this is not a GGUF file")
        try:
            header, data_bytes = _Parser(view).header()
        except (struct.error, IndexError, UnicodeDecodeError, KeyError, OverflowError) as error:
            raise damaged("the GGUF header is damaged or cut off") from error
        except ValueError as error:
            raise damaged(str(error)) from error
    if size < data_bytes:
        raise damaged(f"the GGUF file is cut off: {size} bytes instead of {data_bytes}")
    return header


class _Parser:
    """A cursor over the mapped file."""

    def __init__(self, view: mmap.mmap) -> None:
        self.view = view
        self.offset = 4

    def scalar(self, kind: str) -> Any:
        layout = struct.Struct("<" + kind)
        (value,) = layout.unpack_from(self.view, self.offset)
        self.offset += layout.size
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if self.offset + length > len(self.view):
            raise struct.error("string beyond the end of the file")
        text = self.view[self.offset : self.offset + length].decode("utf-8")
        self.offset += length
        return text

    def header(self) -> tuple[GGUFHeader, int]:
        """The header, and how many bytes the file must have to hold what it announces."""
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not supported (2 and 3 are)")
        tensor_count, pair_count = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for _ in range(pair_count):
            key = self.string()
            kind = self.scalar("I")
            if kind == ARRAY:
                values, lengths[key] = self.array()
                if values is not None:
                    metadata[key] = values
            else:
                metadata[key] = self.string() if kind == STRING else self.scalar(SCALAR_FORMATS[kind])
        relative = dict(self.tensor() for _ in range(tensor_count))
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self.offset // alignment) * alignment
        tensors = {
            name: msgspec.structs.replace(info, start=start + info.start) for name, info in relative.items()
        }
        end = max((info.start + info.nbytes for info in tensors.values()), default=start)
        return GGUFHeader(metadata, lengths, tensors), end

    def array(self) -> tuple[list[Any] | None, int]:
        """A short array of numbers as a list; of any other only its length."""
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == STRING:
            self.skip_strings(count)
            return None, count
        if kind == ARRAY:
            for _ in range(count):
                self.array()
            return None, count
        layout = struct.Struct("<" + SCALAR_FORMATS[kind])
        values = None
        if count <= LONGEST_KEPT_ARRAY:
            values = [layout.unpack_from(self.view, self.offset + i * layout.size)[0] for i in range(count)]
        self.offset += layout.size * count
        return values, count

    def skip_strings(self, count: int) -> None:
        """The one hot loop: local names only, since a vocabulary has up to 2.6e5 entries."""
        unpack, view, offset = struct.Struct("<Q").unpack_from, self.view, self.offset
        for _ in range(count):
            offset += 8 + unpack(view, offset)[0]
        self.offset = offset

    def tensor(self) -> tuple[str, TensorInfo]:
        """Name and record; its ``start`` is still relative to the end of the header."""
        name = self.string()
        dimensions = [self.scalar("Q") for _ in range(self.scalar("I"))]
        kind, offset = self.scalar("I"), self.scalar("Q")
        if kind not in GGML_TYPES:
            raise ValueError(f"tensor {name} has the unknown GGML type {kind}")
        label, weights, size = GGML_TYPES[kind]
        shape = tuple(reversed(dimensions))
        return name, TensorInfo(shape, label, math.prod(shape) // weights * size, offset)
