"""Whether a measurement can be believed: a quantized model reads no text better than what it was made from.

Where it seems to, by more than noise, the measurement is wrong, and not the model good: sequences do not
begin as the model was always shown them (full precision suffers more than what was trained on such ones), the
text that is evaluated is the one that was learned from, or the model is not the one that was meant.

Noise is that of the difference: both models read the same windows, so that some of them are harder than
others does not count. Windows next to each other are put together: at most ``MOST`` numbers are kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 64
LEAST = 0.01
"""A difference of less is never told: one percent of the perplexity."""
ERRORS = 3
"""Nor one that is no more than so many standard errors of it."""
UNKNOWN = 0.05
"""What has to be exceeded where the spread was not kept, by versions before or of a single window."""

CHECK = (
    "check model.bos (how sequences begin), that the evaluated text is not the one that was learned from, "
    "and that the model is the one that was meant"
)


def grouped(nll: Sequence[float]) -> list[float]:
    """Means of at most ``MOST`` groups of windows that follow each other, of nearly equal size."""
    count = min(MOST, len(nll))
    bounds = [len(nll) * index // count for index in range(count + 1)] if count else []
    groups = [nll[first:last] for first, last in itertools.pairwise(bounds)]
    return [round(math.fsum(group) / len(group), 7) for group in groups]


def doubt(label: str, full: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
    """In words, that a version of the model called ``label`` beats full precision by more than noise; empty
    where it does not, or nobody can say. Both are what a checkpoint knows of a measurement."""
    before, after = (_perplexity(full), _perplexity(other))
    if not before or not after:
        return ""
    noise = _noise((full or {}).get("nll"), (other or {}).get("nll"))
    if math.log(before / after) <= noise:
        return ""
    return (
        f"{label} is better than full precision ({after:.4g} against {before:.4g}) by more than the "
        f"{100 * noise:.1f} % that noise explains: something about the measurement is wrong"
    )


def _perplexity(found: Mapping[str, Any] | None) -> float:
    """Zero where there is none."""
    value = (found or {}).get("perplexity")
    return value if isinstance(value, int | float) and 0 < value < math.inf else 0.0


def _noise(full: Any, other: Any) -> float:
    """How far apart the mean losses of two models may be by chance."""
    if not (isinstance(full, list) and isinstance(other, list) and len(full) == len(other) > 1):
        return UNKNOWN
    differences = [one - two for one, two in zip(full, other, strict=True)]
    mean = math.fsum(differences) / len(differences)
    variance = math.fsum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
    return max(LEAST, ERRORS * math.sqrt(variance / len(differences)))
