"""What one export format is made of, asked by whatever writes, describes and verifies an export.

A checkpoint of any format is a Hugging Face checkpoint (:mod:`engine.export.checkpoint`) in which every
quantized linear's ``weight`` is replaced by tensors of the format's own, and whose ``config.json`` says how
they are to be read. A :class:`Layout` knows these two things, and who reads them again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from engine.config.formats import FORMATS, Format
from engine.config.grid import Grid
from engine.config.tables import load_named
from engine.export.reader import CheckpointReader
from engine.quant.packed import PackedWeight


class Linear(NamedTuple):
    """A quantized linear of the model: what a configuration has to say of it."""

    grid: Grid
    out_features: int
    in_features: int

    @classmethod
    def of(cls, weight: PackedWeight) -> Linear:
        return cls(weight.grid, weight.out_features, weight.in_features)

    @property
    def group_size(self) -> int:
        """Weights of a group, where the grid may say that it is the whole row."""
        return self.in_features // self.grid.groups(self.in_features)


Linears = Mapping[str, Linear]
"""Quantized linears by their full names, in the model's order."""


def group_sizes(linears: Linears) -> tuple[int, ...]:
    """Group sizes that occur; rows of different length that are one group each are ``-1``."""
    found = {linear.group_size for linear in linears.values()}
    if len(found) > 1 and all(each.group_size == each.in_features for each in linears.values()):
        return (-1,)
    return tuple(sorted(found))


class Layout(ABC):
    """How one format keeps quantized linears."""

    tags: tuple[str, ...] = ()
    """What the hub's index calls the format."""

    def __init__(self, row: Format) -> None:
        self.format = row

    def names(self, prefix: str) -> tuple[str, ...]:
        """Full names of the tensors that replace ``<prefix>.weight``."""
        return tuple(f"{prefix}.{tensor}" for tensor in self.format.tensors)

    @abstractmethod
    def tensors(self, prefix: str, weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
        """Name and content of the tensors that replace ``<prefix>.weight``.

        Raises:
            PreflightError: for a weight that the format cannot hold.
        """

    @abstractmethod
    def config(self, linears: Linears) -> dict[str, Any]:
        """``quantization_config`` of ``config.json``; asked whenever there are more linears, and at the end.

        Raises:
            PreflightError: names the first linear that does not fit to those before it.
        """

    def files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """JSON files that stand beside ``config.json``, by name."""
        return {}

    @abstractmethod
    def loading(self, config: Mapping[str, Any], blocks_name: str) -> str:
        """The model card's section on how this is loaded; ``blocks_name`` as ``model.layers``."""

    @abstractmethod
    def reader(self, directory: Path) -> CheckpointReader:
        """Opens what was written; shares no code with :meth:`tensors`."""


def layout_of(name: str) -> Layout:
    """The layout of the format called ``name``."""
    row = FORMATS[name]
    layout: Layout = load_named(row.code)(row)
    return layout
