"""Reading a GGUF export back, from the description of the layout alone: bytes, numpy, and a table of names.

The engine has another reader of GGUF files (:mod:`engine.models.gguf`), which shares names and row orders
with what writes them: one owner of each fact. An error there would be made twice and cancel out, so this one
has its own words for all of it. What the metadata make of the network is asked of that other reader all the
same (:class:`GGUFSource`): it is the code by which files of other people are opened.

    "GGUF"  u32 version  u64 tensors  u64 pairs
    pair    text key, u32 type, value; a text is u64 length and UTF-8, an array u32 type, u64 count, values
    tensor  text name, u32 dimensions, u64 each (the fastest first), u32 type, u64 place in the data
    data    begins at the next multiple of general.alignment (32)
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import PreflightError
from engine.export.reader import damaged
from engine.models.gguf import GGUFReader, gguf_config
from engine.system.guarded import bad_file, open_regular

BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 30: (1, 2), 42: (64, 18)}
"""Weights and bytes of a block, by type: F32, F16, Q4_0, Q4_1, Q8_0, BF16, Q2_0."""
PIECE = 16 << 20
"""Bytes of a file that are tried first for its header."""
QUANTIZED = (2, 3, 8, 42)
BITS = {2: 4, 3: 4, 8: 8, 42: 2}
ZEROS = {2: 8, 8: 128, 42: 1}
"""What the integers of a type are less, where they are counted from 0; Q4_1 has a bias for each block."""
_SCALARS = "BbHhIif?"
_WIDE = {10: "Q", 11: "q", 12: "d"}

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {"ffn_up": "mlp.gate_up_proj"}
BESIDE = "rope_freqs.weight"
"""A tensor that is none of the model's."""


class Place(NamedTuple):
    """Where a tensor is."""

    type: int
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        each, size = BLOCKS[self.type]
        return math.prod(self.shape) // each * size


class Blocks(NamedTuple):
    """A quantized linear: ``(number - zero) * d + m``, by blocks; rows as transformers has them."""

    type: int
    numbers_OI: NDArray[np.int8]
    """Less the zero of the type."""
    d_OB: NDArray[np.float16]
    m_OB: NDArray[np.float16] | None

    def weight(self) -> NDArray[np.float32]:
        """float32 ``[O, I]``."""
        rows, blocks = self.d_OB.shape
        parts = self.numbers_OI.reshape(rows, blocks, -1).astype(np.float32)
        parts *= self.d_OB.astype(np.float32)[..., None]
        if self.m_OB is not None:
            parts += self.m_OB.astype(np.float32)[..., None]
        return parts.reshape(rows, -1)

    def parts(self) -> dict[str, Tensor]:
        """The same as integers from 0 on, and what makes weights of them."""
        zero = ZEROS.get(self.type, 0)
        integers = torch.from_numpy((self.numbers_OI.astype(np.int16) + zero).astype(np.uint8))
        parts = {"integers": integers, "scales": torch.from_numpy(self.d_OB.copy())}
        if self.m_OB is not None:
            return parts | {"biases": torch.from_numpy(self.m_OB.copy())}
        return parts | {"zero points": torch.full(self.d_OB.shape, zero, dtype=torch.uint8)}


class _Linear(NamedTuple):
    """A linear as other readers hand it out."""

    blocks: Blocks

    def parts(self) -> dict[str, Tensor]:
        return self.blocks.parts()

    def weight(self) -> Tensor:
        return torch.from_numpy(self.blocks.weight())


class GGUFContent:
    """Metadata and tensors of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise bad_file(error, path) from error
        piece = PIECE
        while True:
            try:
                self._parse(self._read(0, min(piece, size)), size)
                return
            except (struct.error, UnicodeDecodeError, KeyError, ValueError, IndexError) as error:
                if piece >= size:
                    raise damaged(path, f"its header is damaged ({error})") from error
                piece *= 8  # what was read of it may have ended too early

    def _parse(self, data: memoryview, size: int) -> None:
        self._data, self._at = data, 0
        if bytes(data[:4]) != b"GGUF":
            raise ValueError("this is no GGUF file")
        self._at = 8
        tensors, pairs = self._number("Q"), self._number("Q")
        self.metadata = {self._text(): self._value(self._number("I")) for _ in range(pairs)}
        found = {}
        for _ in range(tensors):
            name, dimensions = self._text(), self._number("I")
            shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
            found[name] = Place(self._number("I"), shape, self._number("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: place._replace(start=start + place.start) for name, place in found.items()}
        for name, place in self.tensors.items():
            if place.type not in BLOCKS:
                raise ValueError(f"tensor {name[:80]} is of type {place.type}, which nobody knows")
            if place.start + place.nbytes > size:
                raise ValueError(f"the file ends inside tensor {name[:80]}")
        self._alignment, self._start = alignment, start
        del self._data

    def misplaced(self) -> str:
        """The first tensor that does not begin where the one before it ends, for which llama.cpp refuses a
        file: one of the two has another type or shape than its bytes have. Empty where there is none."""
        end = self._start
        for name, place in self.tensors.items():
            if place.start != end:
                return name
            end += -(-place.nbytes // self._alignment) * self._alignment
        return ""

    def bytes(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, row by row."""
        place = self.tensors[name]
        data = np.frombuffer(self._read(place.start, place.nbytes), np.uint8)
        return data.reshape(*place.shape[:-1], -1)

    def _read(self, start: int, size: int) -> memoryview:
        data = bytearray(size)
        try:
            with os.fdopen(open_regular(self.path), "rb") as file:
                file.seek(start)
                count = file.readinto(data)
        except OSError as error:
            raise bad_file(error, self.path) from error
        if count != size:
            raise damaged(self.path, "it is cut off")
        return memoryview(data)

    def _number(self, kind: str) -> Any:
        value = struct.unpack_from("<" + kind, self._data, self._at)[0]
        self._at += struct.calcsize("<" + kind)
        return value

    def _text(self) -> str:
        length = self._number("Q")
        self._at += length
        if self._at > len(self._data):
            raise ValueError("a text lies beyond its end")
        return str(self._data[self._at - length : self._at], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._text()
        if kind == 9:
            inner, count = self._number("I"), self._number("Q")
            return [self._value(inner) for _ in range(count)]
        return self._number(_WIDE[kind] if kind in _WIDE else _SCALARS[kind])


class GGUFFileReader:
    """Float weights of an export by the model's names; a quantized linear by its blocks."""

    zero_scales = True

    def __init__(self, directory: Path) -> None:
        found = [directory] if directory.is_file() else sorted(directory.glob("*.gguf"))
        if len(found) != 1:
            raise PreflightError(f"holds {len(found)} GGUF files, not one", where=str(directory))
        self.path = found[0]
        self.config: dict[str, Any] = {}
        self.content = GGUFContent(self.path)
        if name := self.content.misplaced():
            raise damaged(self.path, f"tensor {name[:80]} does not begin where the one before it ends")
        self.architecture = str(self.content.metadata.get("general.architecture"))
        words = dict(_BLOCK)
        if self.architecture.startswith("gemma"):
            words |= _GEMMA
        elif self.architecture == "phi3":
            words |= _PHI3
        self._stored = {}
        for stored in self.content.tensors:
            if stored != BESIDE:
                self._stored[self._named(stored, words)] = stored

    def _named(self, stored: str, words: dict[str, str]) -> str:
        stem, _, suffix = stored.rpartition(".")
        if (block := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) and block[2] in words:
            return f"model.layers.{block[1]}.{words[block[2]]}.{suffix}"
        return f"{_OUTER[stem]}.{suffix}" if stem in _OUTER else stored

    # What the comparison asks

    def stored_names(self) -> list[str]:
        return sorted(self._stored)

    def blocks(self, prefix: str) -> Blocks:
        """The linear called ``prefix``."""
        stored = self._place(f"{prefix}.weight")
        place = self.content.tensors[stored]
        if place.type not in QUANTIZED:
            raise damaged(self.path, f"tensor {stored} is of type {place.type}, which is not quantized")
        each, size = BLOCKS[place.type]
        rows, inputs = place.shape
        raw = self._in_order(stored, self.content.bytes(stored)).reshape(rows, inputs // each, size)
        skipped = 4 if place.type == 3 else 2
        numbers = _unpacked(place.type, raw[..., skipped:])
        d = np.ascontiguousarray(raw[..., :2]).view(np.float16)[..., 0]
        m = np.ascontiguousarray(raw[..., 2:4]).view(np.float16)[..., 0] if place.type == 3 else None
        return Blocks(place.type, numbers.reshape(rows, inputs), d, m)

    def is_packed(self, linear: str) -> bool:
        stored = self._stored.get(f"{linear}.weight", "")
        return stored in self.content.tensors and self.content.tensors[stored].type in QUANTIZED

    def parts_of(self, linear: str) -> tuple[str, ...]:
        return (f"{linear}.weight",)

    def linear(self, prefix: str) -> _Linear:
        """The same as in the readers of other formats."""
        return _Linear(self.blocks(prefix))

    def bits_of(self, prefix: str) -> int:
        return BITS[self.content.tensors[self._place(f"{prefix}.weight")].type]

    def adds_one(self, name: str) -> bool:
        """Whether the file holds one more than the model's own value."""
        return self.architecture.startswith("gemma") and name.endswith("norm.weight")

    def stored(self, name: str) -> Tensor:
        """A tensor that is not quantized, as it is in the file, its rows as transformers has them."""
        stored = self._place(name)
        place = self.content.tensors[stored]
        raw = torch.from_numpy(self._in_order(stored, self.content.bytes(stored)).copy())
        kinds = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
        if place.type not in kinds:
            raise damaged(self.path, f"tensor {stored} is of type {place.type}, which is quantized")
        return raw.view(kinds[place.type]).reshape(place.shape)

    def _place(self, name: str) -> str:
        if name not in self._stored:
            raise damaged(self.path, f"tensor {name} is not in it")
        return self._stored[name]

    def _in_order(self, stored: str, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Llama's queries and keys: row ``2 i + j`` of a head is row ``j d/2 + i`` of transformers'."""
        which = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", stored)
        if self.architecture != "llama" or which is None:
            return rows
        key = "attention.head_count" + ("_kv" if which[1] == "k" else "")
        heads = int(self.content.metadata[f"llama.{key}"])
        count = self.content.tensors[stored].shape[0]
        size = count // heads
        order = [head * size + 2 * i + j for head in range(heads) for j in (0, 1) for i in range(size // 2)]
        return rows.reshape(count, -1)[order]

    # What a model that is opened asks

    def names(self) -> list[str]:
        return self.stored_names()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self.content.tensors[self._place(name)].shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def load(self, name: str) -> Tensor:
        if self.content.tensors[self._place(name)].type in QUANTIZED:
            return torch.from_numpy(self.blocks(name.removesuffix(".weight")).weight())
        return self.stored(name).float() - float(self.adds_one(name))

    def where(self, name: str) -> str:
        return str(self.path)

    def files(self) -> list[Path]:
        return [self.path]

    def inventory(self) -> list[str]:
        return [f"{name} {place.type} {place.shape}" for name, place in sorted(self.content.tensors.items())]

    def leftover(self, wanted: Iterable[str]) -> list[str]:
        return []


class GGUFSource:
    """An export in a GGUF file as a model source, so that it runs through the same block-by-block code."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.trust_remote_code = False
        self.weights = GGUFFileReader(self.directory)
        self.config: Any = gguf_config(GGUFReader(self.weights.path))
        self.name = self.weights.path.name


def _unpacked(kind: int, raw: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The numbers of blocks ``[..., bytes]``, less the zero of the type."""
    if kind == 8:
        return np.ascontiguousarray(raw).view(np.int8)
    if kind == 42:
        bits = np.unpackbits(raw, axis=-1, bitorder="little")
        numbers = (bits[..., 0::2] + 2 * bits[..., 1::2]).view(np.int8)
        numbers -= 1
        return numbers
    numbers = np.concatenate([raw % 16, raw // 16], axis=-1).view(np.int8)
    if kind == 2:
        numbers -= 8
    return numbers
