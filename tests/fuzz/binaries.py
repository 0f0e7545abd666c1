"""Changing one field of a safetensors or GGUF file, found by reading the format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import hostile
from hostile import short
from trees import mutate_tree, to_json
from world import World

HUGE = (2**60, 2**63, 2**64 - 1, 2**32, 2**31, 10**6, 0, 1, 255)
"""Counts, lengths and offsets that no file has."""


# -- safetensors ---------------------------------------------------------------------------------------


def mutate_safetensors(path: Path, world: World, chance: Random) -> str:
    """Change the length of the header or one place in it; what was done, in words."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.2:
        said = chance.choice((*HUGE, length + 1, length - 1, len(data), len(data) - 8))
        path.write_bytes(said.to_bytes(8, "little") + data[8:])
        return f"header length {said}"
    header = json.loads(data[8 : 8 + length])
    words = _change_header(header, world, chance)
    encoded = to_json(header).encode("utf-8", "surrogatepass")
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
    return words


def _change_header(header: dict[str, Any], world: World, chance: Random) -> str:
    tensors = [name for name in header if name != "__metadata__"]
    name, other = chance.choice(tensors), chance.choice(tensors)
    begin, end = header[name]["data_offsets"]
    kind = chance.randrange(8)
    if kind == 0:
        header[name]["data_offsets"] = list(header[other]["data_offsets"])
        return f"{name} lies over {other}"
    if kind == 1:
        new = chance.choice(
            [[end, begin], [-8, end], [begin, 2**60], [begin, float("nan")], [begin], [0.5, end]]
        )
        header[name]["data_offsets"] = new
        return f"offsets of {name} {new}"
    if kind == 2:
        new = chance.choice([[2**60], [2**32, 2**32], [-1, 4], [0], [], ["4", 4], [1] * 5000, [True], [4.0]])
        header[name]["shape"] = new
        return f"shape of {name} {short(new)}"
    if kind == 3:
        header[name]["dtype"] = new = chance.choice(
            ("F64", "I32", "F8_E4M3", "X", "", "float32", "BOOL", "C64")
        )
        return f"type of {name} {new}"
    if kind == 4:
        header[new := chance.choice(hostile.texts(world))] = header.pop(name)
        return f"{name} is called {short(new)}"
    if kind == 5:
        header["__metadata__"] = new = hostile.value(world, chance)
        return f"metadata {short(new)}"
    return mutate_tree(header, world, chance)


# -- GGUF ----------------------------------------------------------------------------------------------

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Field:
    """A number in a GGUF file: a count, a length, a type, a value."""

    name: str
    at: int
    size: int


@dataclass
class GGUFMap:
    """Where everything is in a GGUF file."""

    fields: list[Field]
    pairs_end: int = 0
    header_end: int = 0


def map_gguf(data: bytes) -> GGUFMap:
    """The numbers of a GGUF file's header, in order."""
    reader = _Reader(data)
    found = GGUFMap(reader.fields)
    reader.number("version", 4)
    tensors, pairs = reader.number("number of tensors", 8), reader.number("number of pairs", 8)
    for _ in range(pairs):
        key = reader.string("a key")
        reader.value(key, reader.number(f"type of {key}", 4))
    found.pairs_end = reader.at
    for _ in range(tensors):
        name = reader.string("a tensor's name")
        for index in range(reader.number(f"dimensions of {name}", 4)):
            reader.number(f"dimension {index} of {name}", 8)
        reader.number(f"type of {name}", 4)
        reader.number(f"offset of {name}", 8)
    found.header_end = reader.at
    return found


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 4
        self.fields: list[Field] = []

    def number(self, name: str, size: int) -> int:
        self.fields.append(Field(name, self.at, size))
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "little")

    def string(self, name: str) -> str:
        length = self.number(f"length of {name}", 8)
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, name: str, kind: int) -> None:
        if kind == STRING:
            self.string(f"value of {name}")
        elif kind == ARRAY:
            inner, count = self.number(f"type in {name}", 4), self.number(f"count of {name}", 8)
            if inner in SIZES:
                self.at += SIZES[inner] * count
                return
            kept = len(self.fields)
            for _ in range(count):
                self.value(name, inner)
            del self.fields[kept + 3 :]  # three of a vocabulary's lengths are enough
        else:
            self.number(f"value of {name}", SIZES[kind])


def with_pairs(data: bytes, pairs: list[bytes]) -> bytes:
    """A GGUF file with more key-value pairs, its tensors moved to where they belong then."""
    found = map_gguf(data)
    begin = -(-found.header_end // 32) * 32
    count = int.from_bytes(data[16:24], "little") + len(pairs)
    header = data[:16] + count.to_bytes(8, "little") + data[24 : found.pairs_end] + b"".join(pairs)
    header += data[found.pairs_end : found.header_end]
    return header + bytes(-len(header) % 32) + data[begin:]


def pair(key: str, kind: int, value: bytes) -> bytes:
    """A key-value pair, its value encoded already."""
    return text(key) + struct.pack("<I", kind) + value


def text(value: str) -> bytes:
    """A string as GGUF has it."""
    encoded = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded


def hostile_pairs(world: World) -> Iterator[tuple[str, bytes]]:
    """Pairs that no converter writes."""
    for alignment in (0, 1, 3, 2**31, 2**32 - 1):
        yield f"alignment {alignment}", pair("general.alignment", 4, struct.pack("<I", alignment))
    yield "an alignment that is text", pair("general.alignment", STRING, text("32"))
    yield "an alignment that is NaN", pair("general.alignment", 6, struct.pack("<f", float("nan")))
    for depth in (2, 500, 20_000):
        nested = struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", 0, 0)
        yield f"arrays {depth} deep", pair("x.nested", ARRAY, nested)
    for inner in (*SIZES, STRING, ARRAY, 99):
        yield f"2^60 values of type {inner}", pair("x.count", ARRAY, struct.pack("<IQ", inner, 2**60))
    yield "10^7 empty arrays", pair("x.many", ARRAY, struct.pack("<IQ", ARRAY, 10**7))
    for value in hostile.texts(world):
        yield f"name {short(value)}", pair("general.name", STRING, text(value))
        yield f"template {short(value)}", pair("tokenizer.chat_template", STRING, text(value))
        yield f"architecture {short(value)}", pair("general.architecture", STRING, text(value))
        yield f"key {short(value)}", pair(value, 4, struct.pack("<I", 1))


def mutate_gguf(path: Path, world: World, chance: Random) -> str:
    """Change one number of the header, or add a pair; what was done, in words."""
    data = path.read_bytes()
    if chance.random() < 0.4:
        words, added = chance.choice(list(hostile_pairs(world)))
        path.write_bytes(with_pairs(data, [added]))
        return words
    field = chance.choice(map_gguf(data).fields)
    value = chance.choice((*HUGE, 2, 3, STRING, ARRAY, 31, 2**62 + 7)) % 256**field.size
    path.write_bytes(data[: field.at] + value.to_bytes(field.size, "little") + data[field.at + field.size :])
    return f"{field.name} is {value}"
