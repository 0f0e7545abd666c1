"""What a checkpoint holds besides the model's own tensors: carried over into an export, or skipped, and why.

Layers for the prediction of several tokens, layers beyond those that config.json counts, heads for another
task: transformers does not load them, other engines do, and an export's config.json goes on declaring them.
So an export holds them as they were, byte for byte, under the names they had. What is no weight
(:mod:`engine.architecture.leftovers`) stays behind, and so does the rest of a larger model of which only the
language model is exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from engine.architecture.leftovers import COMPUTED
from engine.models.weights import SafetensorsReader

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

NAMED = 3
"""Tensors that a message names before it only counts."""


@dataclass(frozen=True)
class CarriedTensor:
    """A stored tensor that belongs to the checkpoint, but not to the model that is quantized."""

    name: str
    """Its name in an export."""
    stored: str
    """Its name in the source."""
    dtype: str
    """As safetensors calls it (``BF16``); torch need not know it."""
    shape: tuple[int, ...]
    reader: SafetensorsReader

    @property
    def nbytes(self) -> int:
        return self.reader.nbytes(self.stored)

    def raw(self) -> Tensor:
        """Its bytes, uint8 ``[nbytes]``."""
        return self.reader.raw(self.stored)

    def load(self) -> Tensor:
        """The tensor itself; a PreflightError where torch has no such type."""
        return self.reader.load(self.stored)


@dataclass(frozen=True)
class SkippedTensor:
    """A stored tensor that neither the model nor an export takes."""

    stored: str
    why: str


def carried(model: CausalLM) -> list[CarriedTensor]:
    """What an export of the model takes over as it is; nothing of a GGUF file or of random weights."""
    return [each for each in _sorted_out(model) if isinstance(each, CarriedTensor)]


def skipped(model: CausalLM) -> list[SkippedTensor]:
    """What is left behind."""
    return [each for each in _sorted_out(model) if isinstance(each, SkippedTensor)]


def missing(model: CausalLM) -> list[str]:
    """Buffers that belong into the checkpoint and are not there: they keep the value that they are built
    with. (A model that lacks a parameter is refused.)"""
    if not isinstance(model.source.weights, SafetensorsReader):
        return []
    buffers = {name for name, _ in model.model.named_buffers()} & model.model.state_dict().keys()
    return sorted(name for name in buffers if name not in model.weights)


def in_words(model: CausalLM) -> str:
    """One line that counts what is carried, skipped or missing and names the first; empty where the
    checkpoint is the model, no more and no less."""
    said: list[str] = []
    taken: list[str] = []
    reasons: dict[str, list[str]] = {}
    for each in _sorted_out(model):
        names = taken if isinstance(each, CarriedTensor) else reasons.setdefault(each.why, [])
        names.append(each.stored)
    if taken:
        said.append(f"{_counted(taken)} carried over as stored")
    said += [f"{_counted(names)} skipped: {why}" for why, names in reasons.items()]
    if lacking := missing(model):
        said.append(f"{_counted(lacking)} missing, which keep the values that the model is built with")
    return "; ".join(said)


def _counted(names: list[str]) -> str:
    more = ", …" if len(names) > NAMED else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:NAMED])}{more})"


def _sorted_out(model: CausalLM) -> Iterator[CarriedTensor | SkippedTensor]:
    reader = model.source.weights
    if not isinstance(reader, SafetensorsReader):
        return
    structure = model.model.state_dict().keys()
    unlisted = set(reader.unlisted())
    computed = {name for name, _ in model.model.named_buffers()} - structure
    for each in model.names.leftovers:
        shape = reader.shape(each.stored)
        if each.place in structure:
            yield SkippedTensor(each.stored, f"{each.place} is read from {model.names.stored[each.place]}")
        elif each.place in computed:
            yield SkippedTensor(each.stored, COMPUTED)
        elif why := reader.why_left(each.stored, each.place):
            yield SkippedTensor(each.stored, why)
        elif model.source.is_part and not each.inside:
            yield SkippedTensor(each.stored, "not of the language model")
        elif each.stored in unlisted:
            yield SkippedTensor(each.stored, "not in the index")
        else:
            yield CarriedTensor(each.name, each.stored, reader.stored_type(each.stored), shape, reader)
