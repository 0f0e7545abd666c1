"""Values that nobody writes into a file by accident: what each kind of reader has been known to fall over."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

from world import World

DEEP = 100_000
"""Levels of nesting; parsers that recurse give up at a thousand, or crash."""


class Raw(str):
    """Text that goes into a document as it is, without quotes: what no value of the language can say."""


def texts(world: World) -> list[str]:
    """Strings for any place that takes one."""
    touch = f"touch {world.canary}"
    return [
        f"$({touch})",
        f"`{touch}`",
        f"x; {touch}",
        f"x' && {touch} #",
        f"--to={world.home}",
        "\x1b]0;title\x07\x1b[2J\x1b[31mred",
        "\x1b]8;;http://example.org\x1b\\link\x1b]8;;\x1b\\",
        "\x1b]52;c;ZWNobyBo\x07",
        "\x9b31m\x9d0;title\x9c\x90q\x9c",
        "\x7f\x08\x08\x08 \r overwritten",
        "a\x00b",
        "\u202egnp.txt\u2066\u2069\u200f",
        "first\nerror: second\n\n",
        "[bold red]markup[/] [link=x]y[/link] [/",
        "{0.__class__.__mro__} %s%n%d ${HOME} %(name)s",
        "../" * 40 + "etc/hostname",
        "a/" * 2000 + "b",
        "x" * 100_000,
        "\u0301" * 300,
        "👩‍👩‍👧‍👦" * 50,
        "",
        " ",
        "-",
        "NaN",
        "None",
        str(world.secret / "key"),
        str(world.elsewhere),
        str(world.home / "fifo"),
        "/dev/zero",
        "/proc/self/mem",
        ".",
        "..",
        "~root/x",
        "file:///etc/hostname",
        "evil/model--modeling.Model",
    ]


def names(world: World) -> list[str]:
    """File names: at most 255 bytes, no slash, no NUL."""
    short = [text for text in texts(world) if "/" not in text and "\0" not in text]
    usable = [text for text in short if text.strip(".") and len(text.encode()) < 200]
    return [*usable, "n" * 250, "-rf", ".hidden", "a b  c", "*", os.fsdecode(b"\xff\xfe\x9b")]


def numbers() -> list[Any]:
    """Numbers, and what should have been one."""
    return [
        0,
        -1,
        1,
        2,
        2**31,
        2**32,
        2**53 + 1,
        2**63,
        2**64,
        -(2**63) - 1,
        1e15,
        1e308,
        -1e308,
        1e-308,
        0.1,
        True,
    ]


def raws(*, toml: bool = False) -> list[Raw]:
    """Pieces of JSON, or of TOML, that no writer makes."""
    if toml:
        deep = ["[" * DEEP + "]" * DEEP, "{a=" * 5000 + "1" + "}" * 5000]
        rest = [
            "nan",
            "-inf",
            "1e999",
            "9" * 5000,
            "0x" + "f" * 5000,
            "9999-99-99",
            '"\\uD800"',
            "'''",
            "[1, 'a']",
        ]
        return [Raw(text) for text in (*deep, *rest)]
    deep = ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * DEEP]
    rest = [
        "NaN",
        "-Infinity",
        "1e999",
        "9" * 5000,
        "-" + "9" * 400 + ".5",
        '"\\ud800"',
        '"\\u0000"',
        "1e",
        "tru",
        '"',
    ]
    return [Raw(text) for text in (*deep, *rest)]


def value(world: World, chance: Random, *, toml: bool = False) -> Any:
    """Any of them, or a value of another type."""
    kind = chance.choice(("text", "text", "number", "raw", "type"))
    if kind == "text":
        return chance.choice(texts(world))
    if kind == "number":
        return chance.choice(numbers())
    if kind == "raw":
        return chance.choice(raws(toml=toml))
    others: list[Any] = [[], {}, [[]], {"": {}}, [1] * 10_000, {str(i): i for i in range(10_000)}, ["x", 1]]
    return chance.choice(others if toml else [None, *others])


def pieces() -> list[bytes]:
    """Bytes to put anywhere."""
    return [
        b"\0" * 16,
        b"\xff\xfe\xfd",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\x1b]0;x\x07",
        b"\xc2\x9b31m",
        b"\r\n\r\n",
        b'"',
        b"{",
        b"[" * 2000,
        b"\x80" * 100,
        "\u202e".encode(),
        b"9" * 5000,
        b" " * 100_000,
    ]


def short(value: object, length: int = 60) -> str:
    """A value for the description of a case."""
    text = ascii(value)
    return text if len(text) <= length else f"{text[:length]}…({len(text)})"


def secret_for(world: World, path: Path, chance: Random) -> Path:
    """A secret that would parse as what ``path`` is, or one that would not."""
    fitting = world.secret / f"key{path.suffix}"
    return fitting if fitting.exists() and chance.random() < 0.6 else world.secret / "key"
