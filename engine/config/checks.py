"""The checks that sections share: each refuses a value that cannot work, by the name of its field.

A refusal names the field as ``--set`` would (``block_ap.batch_size``), says what is wrong with the value, and
hints at what works.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from engine.errors import UsageError

LARGEST = 2**31 - 1


def text(name: str, value: str, *, hint: str = "") -> None:
    """Something that can be printed."""
    if not value.strip():
        raise UsageError("is empty", where=name, hint=hint)
    if not value.isprintable():
        raise UsageError(f"holds characters that cannot be printed: {value!r}", where=name)


def device(name: str, value: str) -> None:
    """Where torch computes."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value, re.ASCII):
        raise UsageError(f"cannot be {value!r}", where=name, hint="auto, cpu, cuda or cuda:N")


def optional_text(name: str, value: str | None) -> None:
    """None, or something that can be printed."""
    if value is not None:
        text(name, value, hint="leave it out for the default")


def one_of(name: str, value: int, values: Sequence[int], *, hint: str = "") -> None:
    """A number out of ``values``."""
    if value not in values:
        raise UsageError(f"cannot be {value}", where=name, hint=f"one of {listed(values)}{hint}")


def count(name: str, value: int, *, least: int = 1, most: int = LARGEST) -> None:
    """A whole number between ``least`` and ``most``."""
    if not least <= value <= most:
        limit = f"at least {least}" if value < least else f"at most {most}"
        raise UsageError(f"cannot be {value}", where=name, hint=limit)


def finite(name: str, value: float) -> None:
    """Neither NaN nor infinite."""
    if not math.isfinite(value):
        raise UsageError(f"cannot be {value}", where=name, hint="a finite number")


def not_negative(name: str, value: float, *, hint: str) -> None:
    """Zero, whose meaning ``hint`` says, or above."""
    finite(name, value)
    if value < 0:
        raise UsageError(f"cannot be {value:g}", where=name, hint=f"at least 0; {hint}")


def between(name: str, value: float, least: float, most: float) -> None:
    """A number between ``least`` and ``most``."""
    finite(name, value)
    if not least <= value <= most:
        raise UsageError(f"cannot be {value:g}", where=name, hint=f"from {least:g} to {most:g}")


def unique(name: str, values: tuple[str, ...]) -> None:
    """No value twice."""
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise UsageError(f"names {twice[0]!r} twice", where=name)


def listed(values: Sequence[int]) -> str:
    """Numbers in a sentence."""
    return ", ".join(map(str, values))
