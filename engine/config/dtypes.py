"""What a configured compute dtype means on the device at hand."""

from __future__ import annotations

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""


def resolved_dtype(name: str, *, cuda: bool) -> str:
    """The dtype that ``name`` stands for: ``auto`` is bfloat16 on a GPU and float32 on the CPU."""
    if name == "auto":
        return "bfloat16" if cuda else "float32"
    return name
