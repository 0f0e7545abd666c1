"""A model that reads one or several texts at once, full precision beside it where that is there, and what is
told of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.evaluation.beside import Beside, Version, beside
from engine.evaluation.perplexity import PerplexityResult, perplexity
from engine.run.measured import Measured
from engine.run.measures import Divergence, TextMeasure

Paths = tuple[Path | None, Path | None]


@dataclass(frozen=True)
class Measurement:
    """What came of reading windows. Those of a text are the ones from a first to a last, which is not among
    them."""

    result: PerplexityResult
    beside: Beside | None = None
    """Against full precision, where that was read as well."""

    @classmethod
    def joined(cls, parts: Sequence[Measurement]) -> Measurement:
        """As :meth:`PerplexityResult.joined`."""
        compared = [part.beside for part in parts if part.beside is not None]
        if compared:
            found = Beside.joined(compared)
            return cls(found.other, found)
        return cls(PerplexityResult.joined([part.result for part in parts]))

    def text(self, name: str, first: int, last: int) -> TextMeasure:
        """Of the text called ``name``."""
        part = self.result.of_part(first, last)
        return TextMeasure(
            corpus=name,
            perplexity=finite(part.perplexity),
            tokens=part.tokens,
            divergence=self.divergence(first, last),
        )

    def divergence(self, first: int, last: int) -> Divergence | None:
        """From full precision; none where that was not read, or something is not finite."""
        if self.beside is None:
            return None
        values = asdict(self.beside.divergence(first, last))
        return Divergence(**values) if all(map(math.isfinite, values.values())) else None

    def block_errors(self, first: int, last: int) -> tuple[float | None, ...]:
        """Behind each block; none at all where full precision was not read."""
        return () if self.beside is None else tuple(map(finite, self.beside.block_errors(first, last)))


def read(
    version: Version, full: Version | None, windows_NT: Tensor, *, store_paths: Paths, **options: Any
) -> Measurement:
    """Windows through ``version``, beside ``full`` where there is one; the options are those of
    :func:`engine.evaluation.perplexity.perplexity`."""
    if full is not None:
        found = beside(full, version, windows_NT, store_paths=store_paths, **options)
        return Measurement(found.other, found)
    with version.outer():
        path = store_paths[1]
        return Measurement(perplexity(version.lm, version.block_for, windows_NT, store_path=path, **options))


def result_of(
    found: Measurement,
    name: str,
    span: tuple[int, int],
    *,
    sequence_length: int,
    begin: str,
    device: str,
    stage: str = "",
) -> Measured:
    """What is kept of one text."""
    text = found.text(name, *span)
    full = found.beside.full.of_part(*span).perplexity if found.beside is not None else None
    return Measured(
        stage=stage,
        corpus=name,
        sequence_length=sequence_length,
        begin=begin,
        windows=span[1] - span[0],
        tokens=text.tokens,
        perplexity=text.perplexity,
        full_precision=None if full is None else finite(full),
        divergence=text.divergence,
        block_errors=found.block_errors(*span),
        device=device,
        seconds=found.result.seconds,
        t=time.time(),
    )


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
