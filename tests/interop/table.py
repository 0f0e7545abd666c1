"""The table of what was loaded: docs/formats.md, written from a whole run of these tests, never by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from engine.config.formats import FORMATS

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"

HEAD = """# What was loaded

Written by `make interop` from what it tried; not by hand. Each row is one grid of one format in the loader it
is meant for, on a CPU, over tiny random models: {models}.

The weights are those that the loader hands out or unpacks, compared with the trained ones; a dash where it
computes from packed ones. The first prediction is counted where the trained model's two best tokens are
further apart than arithmetic of 16 bits can tell (of GGUF files, because llama.cpp rounds activations to 8
bits, in the quarter of the tokens where they are furthest apart), and the difference of logits is the
largest, in their standard deviations; both are the worst of the models.

| format | bits | group | grid | loader | weights | first prediction | logits differ by |
|---|---|---|---|---|---|---|---|
"""


class Tried(NamedTuple):
    """One export in its loader."""

    format: str
    """Behind its name what else tells its files apart, as the types of GGUF."""
    model: str
    bits: int
    group_size: int
    symmetric: bool
    loader: str
    weights_equal: bool
    """False where the loader has no weights to show; that they are others fails its test."""
    agree: float
    worst: float

    @property
    def row(self) -> tuple[str, int, int, bool]:
        return self.format, self.bits, self.group_size, self.symmetric


def page(tried: Iterable[Tried]) -> str:
    """The page of these trials, in the order of the table of formats."""
    rows: dict[tuple[str, int, int, bool], list[Tried]] = {}
    names = FORMATS.names()
    for each in sorted(tried, key=lambda each: names.index(each.format.split()[0])):
        rows.setdefault(each.row, []).append(each)
    models = dict.fromkeys(each.model for row in rows.values() for each in row)
    return HEAD.format(models=", ".join(models)) + "\n".join(map(_line, rows.values())) + "\n"


def _line(row: list[Tried]) -> str:
    first = row[0]
    cells = [
        re.sub(r"^\S+", r"`\g<0>`", first.format),
        str(first.bits),
        "row" if first.group_size == -1 else str(first.group_size),
        "symmetric" if first.symmetric else "asymmetric",
        first.loader,
        "equal" if first.weights_equal else "–",
        f"{100 * min(each.agree for each in row):.1f} %",
        f"{max(each.worst for each in row):.2g}",
    ]
    return f"| {' | '.join(cells)} |"
