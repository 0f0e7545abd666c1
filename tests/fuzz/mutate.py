"""Changing one file: its bytes, or one place of what it says."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from random import Random

import binaries
import hostile
from trees import mutate_tree, to_json, to_toml
from world import World


def mutate_file(path: Path, world: World, chance: Random) -> str:
    """Change ``path``, half of the time where its format hurts most; what was done, in words."""
    structured = STRUCTURED.get(path.suffix)
    if structured is not None and chance.random() < 0.65:
        try:
            return f"{path.name}: {structured(path, world, chance)}"
        except (ValueError, LookupError, TypeError, RecursionError):
            pass  # it was mutated before, or has no such place
    return f"{path.name}: {mutate_bytes(path, chance)}"


# -- bytes ---------------------------------------------------------------------------------------------


def mutate_bytes(path: Path, chance: Random) -> str:
    """Flip, cut, insert, delete, repeat, overwrite; what was done, in words."""
    data = path.read_bytes()
    name = chance.choice(sorted(_BYTES))
    at = chance.randrange(len(data)) if data else 0
    length = min(chance.choice((1, 2, 8, 100, 4096)), len(data) - at)
    path.write_bytes(_BYTES[name](data, at, length, chance))
    return f"{name} at {at} of {len(data)}, {length} bytes"


def _flip(data: bytes, at: int, length: int, chance: Random) -> bytes:
    if not data:
        return b"\x01"
    changed = bytearray(data)
    changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


_BYTES: dict[str, Callable[[bytes, int, int, Random], bytes]] = {
    "flip a bit": _flip,
    "flip another bit": _flip,
    "cut off": lambda data, at, length, chance: data[:at],
    "empty": lambda data, at, length, chance: b"",
    "insert": lambda data, at, length, chance: data[:at] + chance.choice(hostile.pieces()) + data[at:],
    "delete": lambda data, at, length, chance: data[:at] + data[at + length :],
    "repeat": lambda data, at, length, chance: data[: at + length] + data[at:],
    "overwrite": lambda data, at, length, chance: data[:at] + chance.randbytes(length) + data[at + length :],
    "zero": lambda data, at, length, chance: data[:at] + bytes(length) + data[at + length :],
    "append": lambda data, at, length, chance: data + chance.choice(hostile.pieces()),
    "noise": lambda data, at, length, chance: chance.randbytes(max(16, length)),
    "twice": lambda data, at, length, chance: data + data,
    "20 MB": lambda data, at, length, chance: data[:at] + b" " * (20 << 20) + data[at:],
}


# -- what a file says ----------------------------------------------------------------------------------


def _json(path: Path, world: World, chance: Random) -> str:
    tree = json.loads(path.read_text())
    said = mutate_tree(tree, world, chance)
    _write(path, to_json(tree))
    return said


def _jsonl(path: Path, world: World, chance: Random) -> str:
    lines = path.read_text().splitlines()
    number = chance.randrange(len(lines))
    tree = json.loads(lines[number])
    said = mutate_tree(tree, world, chance)
    action = chance.choice(("replace", "replace", "insert", "end"))
    new = to_json(tree)
    if action == "replace":
        lines[number] = new
    else:
        lines.insert(number if action == "insert" else len(lines), new)
    _write(path, "\n".join(lines) + chance.choice(("\n", "\n", "")))
    return f"{action} line {number + 1}, {said}"


def _toml(path: Path, world: World, chance: Random) -> str:
    tree = tomllib.loads(path.read_text())
    said = mutate_tree(tree, world, chance, toml=True)
    _write(path, to_toml(tree))
    return said


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


STRUCTURED: dict[str, Callable[[Path, World, Random], str]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".toml": _toml,
    ".safetensors": binaries.mutate_safetensors,
    ".gguf": binaries.mutate_gguf,
}
