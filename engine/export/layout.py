"""What one export format is made of, asked by whatever writes, describes and verifies an export.

A :class:`Form` is any format: it opens what was written as a model, and says what in the files is not what
was trained. What writes the files, its row of the table names (``Format.writer``).

A :class:`Layout` is a format whose export is a Hugging Face checkpoint (:mod:`engine.export.checkpoint`):
every quantized linear's ``weight`` is replaced by tensors of the format's own, and ``config.json`` says how
they are to be read. It knows these two things, and who reads them again.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from engine.config.formats import FORMATS, Format
from engine.config.grid import Grid
from engine.config.tables import load_named
from engine.errors import PreflightError
from engine.export.comparing import linear_differences, parts_of, value_differences
from engine.export.reader import CheckpointReader, TensorReader, packed_model, read_json
from engine.export.stored import dtype_name
from engine.models.carried import CarriedTensor, carried
from engine.quant.packed import PackedBlock, PackedWeight

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM


class DoesNotFit(PreflightError):
    """Trained values that a format has no place for; another format may hold them."""


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


def require_one_grid(linears: Linears, name: str) -> Grid:
    """The grid of all linears, as a format wants it that is called ``name`` and describes no more than one.

    Raises:
        PreflightError: names the first linear that has another.
    """
    first = next(iter(linears.values())).grid
    sizes, whole_rows = set(), True
    for linear_name, linear in linears.items():
        grid = linear.grid
        if (grid.bits, grid.symmetric) != (first.bits, first.symmetric):
            raise PreflightError(
                f"has {grid.bits} bits, symmetric={grid.symmetric}, other layers {first.bits} bits, "
                f"symmetric={first.symmetric}; {name} holds one grid for the whole model",
                where=linear_name,
            )
        sizes.add(linear.group_size)
        whole_rows = whole_rows and linear.group_size == linear.in_features
        if len(sizes) > 1 and not whole_rows:
            raise PreflightError(
                f"group sizes {tuple(sorted(sizes))} are mixed; {name} holds one for the whole model",
                where=linear_name,
            )
    return first


def blocks_of(linears: Linears) -> str:
    """Where the blocks of these linears are, as ``model.layers``."""
    return re.split(r"\.\d+\.", next(iter(linears)), maxsplit=1)[0]


def finite_scale(prefix: str, weight: PackedWeight) -> Tensor:
    """The scales ``[O, G]`` in float16, which most formats keep them in.

    Raises:
        PreflightError: for one that float16 cannot hold.
    """
    scale = weight.scale.to(torch.float16)
    if not torch.isfinite(scale).all():
        raise PreflightError("a scale does not fit float16", where=prefix)
    return scale


class Form(ABC):
    """One export format: what a model in it is opened by, and compared with what was trained."""

    tags: tuple[str, ...] = ()
    """What the hub's index calls the format."""
    library: ClassVar[str] = "transformers"
    """The library that the hub's index names for it."""

    def __init__(self, row: Format) -> None:
        self.format = row
        self.heads: Linears = {}
        """Embedding and head as the export calls them, where they are quantized too."""

    def with_heads(self, lm: CausalLM, heads: Mapping[str, PackedWeight]) -> Self:
        """The form for a model whose embedding and head are quantized, by name without ``.weight``."""
        self.heads = {self.linear_called(lm, name): Linear.of(weight) for name, weight in heads.items()}
        return self

    def of(self, lm: CausalLM, dtype: torch.dtype) -> Self:
        """The form for one model, of which everything that is not quantized is stored in ``dtype``."""
        return self

    def refusal(self, blocks: Iterable[PackedBlock]) -> DoesNotFit | None:
        """What of the trained values does not fit, counted, and the nearest format that holds them; asked
        before anything is written. Formats that hold every value do not look at the blocks."""
        return None

    def check(self, lm: CausalLM, stored: torch.dtype) -> None:
        """Asked before anything is trained; ``stored`` is the type of what is not quantized.

        Raises:
            PreflightError: for a model, or a tokenizer, that the format cannot hold.
        """
        return None

    def names(self, prefix: str, grid: Grid | None = None) -> tuple[str, ...]:
        """Full names of the tensors that stand for ``<prefix>.weight``; without a ``grid``, all that may."""
        left_out = self.format.asymmetric_tensors if grid is not None and grid.symmetric else ()
        return tuple(f"{prefix}.{tensor}" for tensor in self.format.tensors if tensor not in left_out)

    def called(self, lm: CausalLM, name: str) -> str:
        """What the export, as it is opened again, calls the model's tensor ``name``."""
        return lm.names.exported(name)

    def linear_called(self, lm: CausalLM, name: str) -> str:
        """What it calls the linear ``name``."""
        return lm.names.exported_linear(name)

    def carried(self, lm: CausalLM) -> list[CarriedTensor]:
        """What it takes over of the checkpoint besides the model."""
        return carried(lm)

    @abstractmethod
    def reader(self, directory: Path) -> TensorReader:
        """Opens the tensors of what was written, by code that shares nothing with what wrote it."""

    @abstractmethod
    def open(
        self, directory: Path, device: torch.device, dtype: torch.dtype, *, trust_remote_code: bool = False
    ) -> CausalLM:
        """The model in an export, by code that shares nothing with what wrote it; ``source.weights`` of it
        are what the comparisons below ask."""

    def declared(self, packed: CausalLM, computed: torch.dtype) -> torch.dtype:
        """The arithmetic that the export asks its readers for; ``computed`` is that of the trained model."""
        dtype: torch.dtype | None = packed.source.config.dtype
        return dtype or torch.float32

    @abstractmethod
    def misdescribed(
        self, packed: CausalLM, lm: CausalLM, stored: torch.dtype, linears: Linears
    ) -> Iterator[str]:
        """What the export says of itself and is not so; ``packed`` is the export as it was opened."""

    @abstractmethod
    def linear_differences(self, packed: CausalLM, name: str, weight: PackedWeight) -> list[str]:
        """What of the linear that the export calls ``name`` is not what was trained."""

    def value_differences(self, packed: CausalLM, name: str, want: Tensor) -> list[str]:
        """What of a tensor that is not quantized is not ``want``: what ``export.dtype`` makes of the trained
        one."""
        return value_differences(packed.source.weights, name, want)  # type: ignore[arg-type]

    def stored_weight(self, weight: PackedWeight) -> Tensor | None:
        """A weight ``[O, I]`` as the files hold it, where that is not just what was trained; else none."""
        return None

    def rounded(self) -> str:
        """What the format rounds, in words, once linears were compared; empty where it holds everything."""
        return ""

    def sentence(self, bits: str, dtype: str) -> str:
        """What the card says of the weights: ``bits`` as "2" or "2 and 3", ``dtype`` that of all else."""
        heads, others = self.head_sentence(), "norms" if self.heads else "embeddings, head and norms"
        return (
            f"The linear layers of the decoder blocks are {bits}-bit integers; {heads}{others} are {dtype}."
        )

    def head_sentence(self) -> str:
        """What stands in that sentence of a quantized embedding and head; empty where they are numbers."""
        if not self.heads:
            return ""
        linear = next(iter(self.heads.values()))
        return f"embedding and head are {linear.grid.bits}-bit integers in groups of {linear.group_size}; "

    def predicted(self, directory: Path, tokens_NT: Tensor) -> Tensor | None:
        """Logits ``[1, T, V]`` of the first of these tokens, as the export's own engine computes them where
        the files hold the network as well; none where they hold its weights alone."""
        return None

    def tolerance(self, of_arithmetic: float) -> float:
        """Largest allowed difference of two logits, in units of their standard deviation, where other
        arithmetic alone explains ``of_arithmetic``; asked once linears were compared."""
        return of_arithmetic


class Layout(Form):
    """How one format keeps quantized linears in a folder in Hugging Face's form."""

    container: ClassVar[str] = "pt"
    """What the header of a safetensors file calls its ``format``."""

    def bits_of(self, weight: PackedWeight) -> int:
        """Bits of a linear's integers, scales and zero points in the file."""
        return weight.words.numel() * 32 + weight.scale.numel() * (16 + weight.bits)

    def parts(self, weight: PackedWeight) -> Mapping[str, Tensor]:
        """What a reader has to find of a linear, bit for bit; see ``StoredLinear.parts``."""
        return parts_of(weight)

    def linear_differences(self, packed: CausalLM, name: str, weight: PackedWeight) -> list[str]:
        reader: Any = packed.source.weights
        return linear_differences(reader, name, self.parts(weight))

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

    def described(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """What stands in ``config.json``, given :meth:`config`."""
        return {"quantization_config": config}

    def files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """JSON files that stand beside ``config.json``, by name."""
        return {}

    @abstractmethod
    def loading(self, config: Mapping[str, Any], blocks_name: str) -> str:
        """The model card's section on how this is loaded; ``blocks_name`` as ``model.layers``."""

    @abstractmethod
    def reader(self, directory: Path) -> CheckpointReader:
        """Opens what was written; shares no code with :meth:`tensors`."""

    def open(
        self, directory: Path, device: torch.device, dtype: torch.dtype, *, trust_remote_code: bool = False
    ) -> CausalLM:
        return packed_model(directory, self.reader, device, dtype, trust_remote_code=trust_remote_code)

    def misdescribed(
        self, packed: CausalLM, lm: CausalLM, stored: torch.dtype, linears: Linears
    ) -> Iterator[str]:
        directory, wanted = packed.source.directory, self.config(linears)
        assert directory is not None
        described, found = self.described(wanted), read_json(directory / "config.json")
        if any(found.get(key) != described.get(key) for key in {"quantization_config", *described}):
            yield "config.json does not describe the trained grid"
        for name, content in self.files(wanted).items():
            if read_json(directory / name) != content:
                yield f"{name} does not describe the trained grid"
        if (declared := self.declared(packed, stored)) != stored:
            yield f"config.json declares {dtype_name(declared)}, and the tensors are {dtype_name(stored)}"


def form_of(name: str) -> Form:
    """The format called ``name``."""
    row = FORMATS[name]
    form: Form = load_named(row.code)(row)
    return form


def layout_of(name: str) -> Layout:
    """The layout of the format called ``name``, whose exports are folders in Hugging Face's form."""
    form = form_of(name)
    assert isinstance(form, Layout), name
    return form
