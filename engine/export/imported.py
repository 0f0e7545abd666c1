"""A quantized checkpoint of anybody as a model whose blocks are finished: what ``eqat import`` makes runs of.

The reader of its format hands out integers, zero points and scales; they are packed as ours, bit for bit.
Everything else of the model (norms, biases, embedding, head, tokenizer) is that of the checkpoint as well: it
is the run's model, and where somebody asks for a weight, the dequantized one.

What a run could not go on from is refused by its name: integers of other widths or in groups of other sizes,
inputs in another order than their groups (``desc_act``), several grids, linears outside of the blocks that
are quantized, scales that are zero or that float16 cannot hold. Scales below zero, which auto-round makes on
symmetric grids, stay what they are. Where a group has a bias in the place of a zero point (MLX), that has to
be a whole multiple of the scale. An embedding and a head that are quantized as ``grid.head_bits`` has them
are taken over as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.architecture.description import QUANTIZATION, local_config, resolve_source, without_quantization
from engine.architecture.model_folder import ModelFolder
from engine.architecture.refusals import refuse_model
from engine.config.formats import FORMATS
from engine.config.grid import BITS, GROUP_SIZES, HEAD_BITS, Grid, GridConfig
from engine.config.model import ModelConfig
from engine.errors import EqatError, PreflightError
from engine.export.described import PLAIN, beyond_the_weights, format_in, layers_of
from engine.export.judging import UNFIT, faults
from engine.export.layout import Layout, form_of
from engine.export.reader import CheckpointReader, regular_groups
from engine.models.causal_lm import CausalLM
from engine.models.heads import head_names
from engine.models.source import ModelSource, read_config
from engine.models.weights import SafetensorsReader
from engine.quant.packed import PackedBlock, PackedWeight
from engine.quant.packing import bitpack

NO_NAMES: Mapping[str, str] = {}
ZERO_BIAS = "a bias of zeros, which the model does not have"


class PackedWeights(SafetensorsReader):
    """A packed checkpoint under the names of a plain one; its linears are dequantized when they are asked
    for."""

    def __init__(self, directory: Path, folder: ModelFolder, packed: CheckpointReader) -> None:
        super().__init__(directory, folder)
        self.packed = packed
        mark = f".{packed.suffixes[0]}"
        names = (*super().names(), *super().unlisted())
        self.linears = {name.removesuffix(mark) for name in names if name.endswith(mark)}
        """Quantized linears by their names in the files."""
        self._parts = {f"{linear}.{part}" for linear in self.linears for part in packed.suffixes}

    def names(self) -> list[str]:
        plain = (name for name in super().names() if name not in self._parts)
        return sorted([*plain, *(f"{linear}.weight" for linear in self.linears)])

    def unlisted(self) -> list[str]:
        return [name for name in super().unlisted() if name not in self._parts]

    def __contains__(self, name: str) -> bool:
        return self._linear(name) is not None or (name not in self._parts and super().__contains__(name))

    def shape(self, name: str) -> tuple[int, ...]:
        linear = self._linear(name)
        if linear is None:
            return super().shape(name)
        with fitting(linear, self.where(name)):
            return self.packed.linear_shape(linear)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self._linear(name) is not None else super().dtype(name)

    def where(self, name: str) -> str:
        linear = self._linear(name)
        return super().where(name if linear is None else f"{linear}.{self.packed.suffixes[0]}")

    def load(self, name: str) -> Tensor:
        linear = self._linear(name)
        if linear is None:
            return super().load(name)
        self.check(linear)
        with fitting(linear, self.where(name)):
            return self.packed.linear(linear).weight()

    def check(self, linear: str) -> None:
        """IdentityError when a file that holds a part of the linear is no longer the one that was opened."""
        for part in self.packed.suffixes:
            if super().__contains__(f"{linear}.{part}"):
                self._entry(f"{linear}.{part}").file.check()

    def why_left(self, name: str, place: str) -> str:
        if name.removesuffix(".bias") in self.linears and not self.load(name).any():
            return ZERO_BIAS  # which early GPTQ files have for every linear
        return super().why_left(name, place)

    def _linear(self, name: str) -> str | None:
        linear = name.removesuffix(".weight")
        return linear if linear != name and linear in self.linears else None


@contextmanager
def fitting(linear: str, where: str) -> Iterator[None]:
    """What tensors raise that do not fit each other is told as the fault of the file that it is."""
    try:
        yield
    except (EqatError, torch.OutOfMemoryError):
        raise
    except UNFIT as error:
        said = (str(error).splitlines() or [""])[0][:120]
        raise PreflightError(f"the tensors of {linear} do not fit each other: {said}", where=where) from error


class ImportedSource(ModelSource):
    """The model in a packed checkpoint, which it describes without the packing."""

    weights: PackedWeights

    def __init__(self, quantization: dict[str, Any], *arguments: Any, **named: Any) -> None:
        self.quantization = quantization
        super().__init__(*arguments, **named)

    def _digest(self) -> str:
        # The same bytes mean something else under another description.
        said = json.dumps(self.quantization, sort_keys=True, default=str)
        return hashlib.sha256(f"{super()._digest()}{said}".encode()).hexdigest()

    def stored_config(self) -> dict[str, Any] | None:
        stored = super().stored_config()
        return None if stored is None else without_quantization(stored)


_ANEW = {PLAIN: "eqat run --model quantizes it", "gguf": "a .gguf file can be quantized anew"}
"""What else can be done with what is not imported, by its format."""


def imported_source(model: ModelConfig) -> ImportedSource:
    """The checkpoint that ``model`` names, opened; no linear is read yet.

    Raises:
        PreflightError: for what is no quantized checkpoint, or none that can be imported.
    """
    path = resolve_source(model.source)
    if isinstance(path, str):
        raise PreflightError(
            "is no folder on this machine", where=path, hint="download the checkpoint, then name its folder"
        )
    name = format_in(path)
    form = form_of(name)
    if not isinstance(form, Layout) or name == PLAIN:
        label = FORMATS[name].label
        raise PreflightError(
            "it is not quantized" if name == PLAIN else f"blocks cannot be imported from {label}",
            where=str(path),
            hint=_ANEW.get(name, ""),
        )
    packed = form.reader(path)
    refuse_description(packed, "imported")
    folder = ModelFolder.judge(path)
    refuse_model(without_quantization(local_config(folder)), {})
    config = read_config(folder, model.trust_remote_code)
    for field in QUANTIZATION:
        if hasattr(config, field):
            delattr(config, field)
    if config.get_text_config() is not config:
        raise PreflightError(
            f"it is a part of a larger model ({config.model_type}), and only language models that stand "
            "alone can be imported",
            where=str(path),
        )
    weights = PackedWeights(path, folder, packed)
    if not weights.linears:
        raise PreflightError(f"no linear of it is quantized as {form.format.label} says", where=str(path))
    return ImportedSource(
        packed.quantization,
        path.name,
        "directory",
        config,
        weights,
        folder=folder,
        trust_remote_code=model.trust_remote_code,
    )


def refuse_description(packed: CheckpointReader, doing: str) -> None:
    """What the checkpoint says of itself and would be left out of what it is: it cannot be what ``doing``
    says."""
    said = packed.quantization
    layers = layers_of(said)
    weights = [each["weights"] for each in layers if isinstance(each.get("weights"), dict)]
    found = {
        "its integers are packed for one kernel (Marlin)": said.get("is_marlin_format"),
        "its words are not of 32 bits": said.get("pack_dtype") not in (None, "int32"),
        "it says that it has no zero points": said.get("quant_method") == "awq"
        and said.get("zero_point") is False,
        "its weights are no integers": any(each.get("type", "int") != "int" for each in weights),
    }
    for why in (*beyond_the_weights(said), *(why for why, so in found.items() if so)):
        raise PreflightError(f"cannot be {doing}: {why}", where=str(packed.directory / "config.json"))


class Unpacked(NamedTuple):
    """A quantized linear as its file holds it."""

    codes_OI: Tensor
    zero_OG: Tensor
    scale_OG: Tensor
    """float16."""
    bits: int

    @property
    def group_size(self) -> int:
        return self.codes_OI.shape[1] // self.scale_OG.shape[1]

    @property
    def whole_rows(self) -> bool:
        return self.scale_OG.shape[1] == 1

    def all_zeros_are(self, value: int) -> bool:
        """Whether every zero point is ``value``."""
        return bool((self.zero_OG == value).all())


def unpack(weights: PackedWeights, linear: str) -> Unpacked:
    """One quantized linear, called as in the files.

    Raises:
        PreflightError: names what of it cannot be taken over.
    """
    weights.check(linear)
    packed, where = weights.packed, weights.where(f"{linear}.weight")
    with fitting(linear, where):
        parts, bits = dict(packed.linear(linear).parts()), packed.bits_of(linear)
        found = next(faults(parts), "") or _unfit(parts, bits)
        if not found and "biases" in parts:
            parts["zero points"] = _zeros_of(parts["biases"], parts["scales"])
            found = _inexact(parts, bits)
        if found:
            raise PreflightError(f"{linear}: {found}", where=where)
        codes, zeros, scales = parts["integers"], parts["zero points"], parts["scales"]
        return Unpacked(codes, zeros.to(torch.uint8), scales.to(torch.float16), bits)


def _zeros_of(biases: Tensor, scales: Tensor) -> Tensor:
    """What ``-z * s`` was made of: whole numbers in float64, which may lie outside of the grid."""
    return (-biases.double() / scales.double()).round() + 0.0


def _inexact(parts: dict[str, Tensor], bits: int) -> str:
    """What biases have that zero points of our grid cannot say; empty where there is nothing."""
    zeros, biases = parts["zero points"], parts["biases"]
    same = ((0.0 - zeros * parts["scales"].double()).to(biases.dtype) == biases) & (zeros >= 0)
    if count := int((~(same & (zeros < 1 << bits))).sum()):
        return f"{count} of {zeros.numel()} biases are no zero points: not a whole multiple of the scale"
    return ""


def _unfit(parts: dict[str, Tensor], bits: int) -> str:
    """What of a sound linear our grid has no place for; empty where it has."""
    codes, scales = parts["integers"], parts["scales"]
    inputs, groups = codes.shape[1], scales.shape[1]
    if bits not in BITS:
        return f"{bits} bits are none of {', '.join(map(str, BITS))}"
    if inputs * bits % 32:
        return f"{inputs} inputs of {bits} bits do not fill whole 32-bit words"
    listed = parts.get("group indices")
    if listed is not None and not torch.equal(listed.to(torch.int32), regular_groups(inputs, groups)):
        return "its inputs are in activation order (desc_act, g_idx), which a run cannot hold"
    if count := int((scales.to(torch.float16).to(scales.dtype) != scales).sum()):
        return f"{count} of {scales.numel()} scales do not fit float16"
    return ""


class Grids:
    """The grid that all linears of a checkpoint share."""

    def __init__(self) -> None:
        self._first: tuple[str, Unpacked] | None = None
        self._sizes: set[int] = set()
        self._whole_rows = True
        self._held: set[int] | None = None

    def add(self, linear: str, found: Unpacked) -> None:
        """One more.

        Raises:
            PreflightError: for one on another grid than those before it.
        """
        self._first = self._first or (linear, found)
        name, first = self._first
        self._sizes.add(found.group_size)
        self._whole_rows = self._whole_rows and found.whole_rows
        if found.bits != first.bits or (len(self._sizes) > 1 and not self._whole_rows):
            raise PreflightError(
                f"is w{found.bits}g{found.group_size}, and {name} w{first.bits}g{first.group_size}: a "
                "checkpoint of several grids cannot be imported",
                where=linear,
            )
        if not self._whole_rows and found.group_size not in GROUP_SIZES:
            sizes = ", ".join(str(size) for size in GROUP_SIZES if size > 0)
            raise PreflightError(f"groups of {found.group_size} are none of {sizes}", where=linear)
        here = {value for value in {1, 2 ** (found.bits - 1)} if found.all_zeros_are(value)}
        self._held = here if self._held is None else self._held & here

    def shared(self) -> Grid:
        """Of every linear that was added. Where all zero points are the same, they are fixed."""
        assert self._first is not None, "there are no linears"
        first, size = self._first[1], min(self._sizes)
        group_size = size if len(self._sizes) == 1 and size in GROUP_SIZES else -1
        middle, held = 2 ** (first.bits - 1), self._held or set()
        if middle in held:
            return Grid(first.bits, group_size, True)
        return Grid(first.bits, group_size, False, 1 if 1 in held and first.bits == 2 else None)


def check_whole(lm: CausalLM, source: ImportedSource, heads: Mapping[str, str] = NO_NAMES) -> None:
    """The linears of the blocks are quantized, all of them, and nothing else is but ``heads``, which are
    taken over as well (:func:`quantized_heads`).

    Raises:
        PreflightError: names the first linear of which this is not so.
    """
    wanted = {linear for index in range(lm.blocks) for linear in stored_linears(lm, index).values()}
    for linear in sorted(wanted - source.weights.linears):
        raise PreflightError(
            "is not quantized: only a checkpoint whose blocks are quantized as a whole can be imported",
            where=linear,
        )
    for linear in sorted(source.weights.linears - wanted - set(heads.values())):
        raise PreflightError(
            "is quantized, and lies outside of the blocks: only linears of the blocks can be imported, and "
            "embedding and head together",
            where=linear,
        )
    for each in lm.names.leftovers:
        linear = each.stored.removesuffix(".bias")
        if linear != each.stored and linear in wanted and source.weights.load(each.stored).any():
            raise PreflightError(
                "is a bias that the model has no place for", where=f"{source.name}: {each.stored}"
            )


def quantized_heads(lm: CausalLM, source: ImportedSource) -> dict[str, str]:
    """Embedding and head, if both are quantized (or are one and the same): what the files call each, by its
    name in the model."""
    if not source.weights.linears:
        return {}
    weights = (lm.model.get_input_embeddings(), lm.model.get_output_embeddings())
    if any(getattr(each, "weight", None) is None for each in weights):
        return {}
    names = {name: lm.names.stored[f"{name}.weight"].removesuffix(".weight") for name in head_names(lm)}
    return names if source.weights.linears >= set(names.values()) else {}


def imported_heads(source: ImportedSource, heads: Mapping[str, str], grid: Grid) -> dict[str, PackedWeight]:
    """Embedding and head of the checkpoint by their names in the model, all of which are on ``grid``.

    Raises:
        PreflightError: for one that is on another, or that cannot be taken over.
    """
    return {name: _on_grid(source, stored, grid) for name, stored in heads.items()}


def head_bits(source: ImportedSource, heads: Mapping[str, str], blocks: Grid) -> int:
    """What ``grid.head_bits`` has to be for ``heads`` of a checkpoint whose blocks are on a grid; 0 where
    there are none.

    Raises:
        PreflightError: for some that are on no grid which it can ask for.
    """
    if not heads:
        return 0
    bits = source.weights.packed.bits_of(next(iter(heads.values())))
    grid = head_grid(bits, blocks)
    if grid is None:
        raise PreflightError(
            f"an embedding and a head of {bits} bits cannot be imported", where=next(iter(heads.values()))
        )
    imported_heads(source, heads, grid)
    return bits


def head_grid(bits: int, blocks: Grid) -> Grid | None:
    """The grid that ``grid.head_bits`` means where the blocks are on ``blocks``."""
    if bits not in HEAD_BITS:
        return None
    held = blocks.fixed_zero_point is not None and not blocks.symmetric
    config = GridConfig(
        bits=blocks.bits,
        group_size=blocks.group_size,
        symmetric=blocks.symmetric,
        zero_point="fixed" if held else "learned",
        head_bits=bits,
    )
    return config.head


def stored_linears(lm: CausalLM, index: int) -> dict[str, str]:
    """The linears of a block: what the files call each, by its name relative to the block."""
    full = {name: f"{lm.block_prefix(index)}.{name}.weight" for name in lm.linear_names(index)}
    return {name: lm.names.stored[weight].removesuffix(".weight") for name, weight in full.items()}


def imported_block(lm: CausalLM, source: ImportedSource, index: int, grid: Grid) -> PackedBlock:
    """Block ``index`` of the checkpoint, all of whose linears are on ``grid``.

    Raises:
        PreflightError: for a linear that is on another one, or that cannot be taken over.
    """
    linears = {name: _on_grid(source, stored, grid) for name, stored in stored_linears(lm, index).items()}
    return PackedBlock(linears, dict(_others(lm, index)))


def _on_grid(source: ImportedSource, stored: str, grid: Grid) -> PackedWeight:
    """The linear that the files call ``stored``, which is on ``grid``."""
    found = unpack(source.weights, stored)
    fixed = grid.fixed_zero_point
    on_it = found.bits == grid.bits and (fixed is None or found.all_zeros_are(fixed))
    size = grid.group_size if grid.group_size > 0 else found.codes_OI.shape[1]
    if not on_it or found.group_size != size:
        raise PreflightError(
            f"is w{found.bits}g{found.group_size}, which is not the run's grid",
            where=stored,
            hint="eqat import finds the grid by itself",
        )
    words = bitpack(found.codes_OI, grid.bits, dim=1)
    return PackedWeight(words, found.scale_OG, found.zero_OG, grid)


def _others(lm: CausalLM, index: int) -> list[tuple[str, Tensor]]:
    """The block's other parameters as they are stored, by their names relative to it."""
    prefix = f"{lm.block_prefix(index)}."
    weights = {f"{prefix}{name}.weight" for name in lm.linear_names(index)}
    names = [
        name for name, _ in lm.model.named_parameters() if name.startswith(prefix) and name not in weights
    ]
    found = []
    for name in names:
        value = lm.weights.load(name)
        if not value.isfinite().all():
            raise PreflightError("holds NaN or infinity", where=f"{lm.weights.where(name)}: {name}")
        found.append((name.removeprefix(prefix), value))
    return found
