"""What a GGUF file says about itself: key/value pairs and tensor records, without reading a weight.

Magic, version, number of tensors, number of key/value pairs; the pairs (typed; the token lists are arrays of
some 10^5 strings, which are stepped over, not decoded); then one record a tensor with its dimensions in
reverse order.

Every number in it comes from somebody else and decides where the reader goes next or how often it repeats, so
each is bounded before it is used. The beginning of the file is read, not mapped: a file that somebody cuts
off meanwhile would end a process that has it mapped with a bus error.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import msgspec

from engine.architecture.headers import (
    LARGEST_DIMENSION,
    MOST_DIMENSIONS,
    TensorInfo,
    is_name,
)
from engine.architecture.model_folder import DOWNLOAD_AGAIN
from engine.errors import PreflightError
from engine.system.guarded import BadFile, bad_file
from engine.system.stamps import StampedFile

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

GGUF_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
"""GGUF architectures whose tensors are known to come out as transformers has them, and its names for them.
Mistral files call themselves llama."""

SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LONGEST_KEPT_ARRAY = 1024
"""Per-layer arrays (head counts, feed-forward lengths) are kept; token scores and types are not."""


FIRST_PIECE, LARGEST_HEADER = 4 << 20, 256 << 20
"""Bytes of the file that are tried first (a vocabulary of 5·10^4 words fits), and at most."""
MOST_PAIRS, MOST_TENSORS = 1 << 16, 1 << 20
MOST_STRINGS = 1 << 24
"""In all arrays together; the largest vocabularies have 3·10^5 words and as many merges."""
MOST_ARRAYS, DEEPEST_ARRAY = 1 << 16, 4
LARGEST_ALIGNMENT = 1 << 20
LARGEST_PLACE = 1 << 62


class GGUFHeader(msgspec.Struct, frozen=True):
    """Key/value pairs and tensors of a GGUF file."""

    metadata: dict[str, Any]
    """Scalars, strings and short arrays of numbers."""
    array_lengths: dict[str, int]
    """Length of every array, also of those that were stepped over."""
    tensors: dict[str, TensorInfo]
    """Shapes in the usual order: [out, in]."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the kind of model; empty where the file gives none."""
        return str(self.metadata.get("general.architecture", ""))[:80]


def supported_gguf(header: GGUFHeader, path: Path) -> str:
    """The architecture of a file, which the engine can read.

    Raises:
        PreflightError: for any other.
    """
    name = header.architecture
    if name not in GGUF_MODEL_TYPES:
        raise PreflightError(
            f"GGUF architecture {name or '(none)'!r} is not supported",
            where=str(path),
            hint=f"use safetensors files of this model; GGUF works for {', '.join(GGUF_MODEL_TYPES)}",
        )
    return name


def read_gguf_header(path: Path) -> GGUFHeader:
    """:func:`gguf_header` of a file that nobody has looked at before."""
    return gguf_header(StampedFile.of(path))


def gguf_header(file: StampedFile) -> GGUFHeader:
    """Key/value pairs and tensor records of a GGUF file (version 2 or 3, little-endian).

    Raises:
        BadFile: naming the file.
        IdentityError: when the file is another one than that which was stamped.
    """
    if file.size < 24:
        raise _damaged(file, "the GGUF file is empty or cut off")
    piece = FIRST_PIECE
    while True:
        view = _beginning(file, piece)
        if view[:4] != b"GGUF":
            raise _damaged(file, "this is not a GGUF file")
        try:
            header, data_bytes = _Parser(view, file.size).header()
        except _Beyond as error:
            if len(view) < min(file.size, LARGEST_HEADER):
                piece *= 8
                continue
            raise _damaged(file, "the GGUF header is damaged or cut off") from error
        except ValueError as error:
            raise _damaged(file, str(error)) from error
        if file.size < data_bytes:
            raise _damaged(file, f"the GGUF file is cut off: {file.size} bytes instead of {data_bytes}")
        return header


def _beginning(file: StampedFile, count: int) -> bytes:
    try:
        with file.opened() as stream:
            return stream.read(min(count, LARGEST_HEADER))
    except OSError as error:
        raise bad_file(error, file.path) from error


def _damaged(file: StampedFile, reason: str) -> BadFile:
    return BadFile(reason, where=str(file.path), hint=DOWNLOAD_AGAIN)


class _Beyond(Exception):
    """The header goes on behind what was read of the file."""


class _Parser:
    """A cursor over the beginning of a file of ``size`` bytes.

    Raises _Beyond where that is too short, ValueError with a sentence for what no file can hold.
    """

    def __init__(self, view: bytes, size: int) -> None:
        self.view = view
        self.size = size
        self.offset = 4
        self.strings = 0
        self.arrays = 0

    def skip(self, count: int) -> int:
        """Where the next ``count`` bytes begin."""
        begin = self.offset
        if count > self.size - begin:
            raise ValueError("the GGUF header is damaged or cut off: a value lies beyond the end of the file")
        if count > len(self.view) - begin:
            raise _Beyond
        self.offset += count
        return begin

    def scalar(self, kind: str) -> Any:
        layout = struct.Struct("<" + kind)
        return layout.unpack_from(self.view, self.skip(layout.size))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        begin = self.skip(length)
        try:
            return self.view[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError("the GGUF header is damaged: a text is not UTF-8") from error

    def count(self, what: str, smallest: int, most: int) -> int:
        """A number of things of at least ``smallest`` bytes each that still have to come."""
        number = int(self.scalar("Q"))
        if number > min(most, (self.size - self.offset) // smallest):
            raise ValueError(f"the GGUF header is damaged or cut off: it announces {number} {what}")
        return number

    def header(self) -> tuple[GGUFHeader, int]:
        """The header, and how many bytes the file must have to hold what it announces."""
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not supported (2 and 3 are)")
        tensor_count = self.count("tensors", 24, MOST_TENSORS)
        pair_count = self.count("settings", 13, MOST_PAIRS)
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for _ in range(pair_count):
            key = self.string()
            if key in metadata or key in lengths:
                raise ValueError(f"the GGUF header is damaged: it has two settings {key[:80]!r}")
            self.pair(key, metadata, lengths)
        relative: dict[str, TensorInfo] = {}
        for _ in range(tensor_count):
            name, info = self.tensor()
            if name in relative:
                raise ValueError(f"the GGUF header is damaged: it has two tensors {name[:80]!r}")
            relative[name] = info
        alignment = _alignment(metadata.get("general.alignment", 32))
        start = -(-self.offset // alignment) * alignment
        tensors = {
            name: msgspec.structs.replace(info, start=start + info.start) for name, info in relative.items()
        }
        end = max((info.start + info.nbytes for info in tensors.values()), default=start)
        return GGUFHeader(metadata, lengths, tensors), end

    def pair(self, key: str, metadata: dict[str, Any], lengths: dict[str, int]) -> None:
        """A value, which goes into one of the two tables or, for a short array, both."""
        kind = self.scalar("I")
        if kind == ARRAY:
            values, lengths[key] = self.array()
            if values is not None:
                metadata[key] = values
        else:
            metadata[key] = self.string() if kind == STRING else self.scalar(_format(kind))

    def array(self, depth: int = 1) -> tuple[list[Any] | None, int]:
        """A short array of numbers as a list; of any other only its length."""
        self.arrays += 1
        if depth > DEEPEST_ARRAY or self.arrays > MOST_ARRAYS:
            raise ValueError("the GGUF header is damaged: it has lists of lists without end")
        kind = self.scalar("I")
        if kind == STRING:
            count = self.count("texts", 8, MOST_STRINGS - self.strings)
            self.strings += count
            self.skip_strings(count)
            return None, count
        if kind == ARRAY:
            count = self.count("lists", 12, MOST_ARRAYS)
            for _ in range(count):
                self.array(depth + 1)
            return None, count
        layout = struct.Struct("<" + _format(kind))
        count = self.count("numbers", layout.size, LARGEST_HEADER)
        begin = self.skip(layout.size * count)
        if count > LONGEST_KEPT_ARRAY:
            return None, count
        return [layout.unpack_from(self.view, begin + i * layout.size)[0] for i in range(count)], count

    def skip_strings(self, count: int) -> None:
        """The one hot loop: local names only, since a vocabulary has up to 2.6e5 entries."""
        unpack, view, offset = struct.Struct("<Q").unpack_from, self.view, self.offset
        last = len(view) - 8
        for _ in range(count):
            if offset > last:
                break
            offset += 8 + unpack(view, offset)[0]
        else:
            if offset <= len(view):
                self.offset = offset
                return
        if offset > self.size:
            raise ValueError("the GGUF header is damaged or cut off: a text lies beyond the end of the file")
        raise _Beyond

    def tensor(self) -> tuple[str, TensorInfo]:
        """Name and record; its ``start`` is still relative to the end of the header."""
        name = self.string()
        if not is_name(name):
            raise ValueError(f"the GGUF header is damaged: {name[:80]!r} is no name of a tensor")
        count = self.scalar("I")
        if count > MOST_DIMENSIONS:
            raise ValueError(f"the GGUF header is damaged: tensor {name[:80]} has {count} dimensions")
        dimensions = [self.scalar("Q") for _ in range(count)]
        kind, offset = self.scalar("I"), self.scalar("Q")
        if kind not in GGML_TYPES:
            raise ValueError(f"tensor {name[:80]} has the unknown GGML type {kind}")
        label, weights, size = GGML_TYPES[kind]
        shape = tuple(reversed(dimensions))
        elements = math.prod(shape)
        if max(shape, default=0) >= LARGEST_DIMENSION or max(elements, offset) >= LARGEST_PLACE:
            raise ValueError(
                f"the GGUF header is damaged: tensor {name[:80]} has an impossible size or place"
            )
        if elements % weights:
            raise ValueError(f"the GGUF header is damaged: tensor {name[:80]} is no whole number of blocks")
        return name, TensorInfo(shape, label, elements // weights * size, offset)


def _format(kind: int) -> str:
    if kind not in SCALAR_FORMATS:
        raise ValueError(f"the GGUF header is damaged: there is no value of type {kind}")
    return SCALAR_FORMATS[kind]


def _alignment(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_ALIGNMENT:
        raise ValueError(f"the GGUF header is damaged: general.alignment is {str(value)[:80]}")
    if value & (value - 1):
        raise ValueError(f"the GGUF header is damaged: general.alignment {value} is no power of two")
    return value
