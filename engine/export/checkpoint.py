"""A packed checkpoint in Hugging Face's form, whatever keeps the quantized linears in it.

Every quantized linear becomes tensors of the format's own (:mod:`engine.export.layout`); everything else
stays a tensor, in the type that the export declares (:mod:`engine.export.stored`). The integers come from
training and are written as they are: nothing is dequantized and rounded again. Names are those that
transformers would save them under (:mod:`engine.models.names`), and what the checkpoint holds besides is
copied (:mod:`engine.models.carried`).

Blocks are asked for one at a time and their tensors appended to the open shard, so an export holds one block.
The directory is built and verified under another name and takes its own when that is done (``place.py``).

An embedding and a head that are quantized too (``grid.head_bits``) are written as linears are, by the formats
that hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.architecture.headers import header_room
from engine.architecture.model_folder import copied_bytes
from engine.config.tables import load_named
from engine.errors import PreflightError
from engine.export.card import model_card
from engine.export.layout import Form, Layout, Linear
from engine.export.model_config import export_config
from engine.export.named_code import drop_missing_code, modules_in, without_missing
from engine.export.place import ExportPlace
from engine.export.reader import read_json
from engine.export.result import ExportResult
from engine.export.shards import ShardWriter, write_durably, write_json
from engine.export.stored import dtype_name, export_dtype, stored_form
from engine.quant.packed import PackedBlock, PackedWeight
from engine.system.guarded import opened_folder

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM
    from engine.models.source import ModelSource

SMALL_FILES = 64 << 10
"""Bytes that model card, configuration and the tokenizer of a random model take at most."""


class _Written:
    """The quantized linears that were written so far."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.linears: dict[str, Linear] = {}
        self._packed_bits = self._weights = 0

    def add(self, name: str, weight: PackedWeight) -> None:
        self.linears[name] = Linear.of(weight)
        self.count(weight)

    def count(self, weight: PackedWeight) -> None:
        """Count what a linear, or an embedding or a head, takes."""
        self._packed_bits += self.layout.bits_of(weight)
        self._weights += weight.out_features * weight.in_features

    @property
    def bits_per_weight(self) -> float:
        return self._packed_bits / max(1, self._weights)


@dataclass(frozen=True, kw_only=True)
class Export:
    """A trained model that is to be written in one format."""

    form: Form
    lm: CausalLM
    source: ModelSource
    block_for: Callable[[int], PackedBlock]
    """Asked once for each block, in order."""
    shard_bytes: int
    card: dict[str, Any]
    """Described in ``card.py``."""
    dtype: str = "auto"
    """``export.dtype``."""
    on_block: Callable[[int, int], None] | None = None
    """Hears of blocks that are done and of all there are; may raise to stop."""
    heads: Mapping[str, PackedWeight] = field(default_factory=dict)
    """Embedding and head by name without ``.weight``, where they are quantized too."""

    @property
    def stored_as(self) -> torch.dtype:
        """What everything that is not quantized is stored in."""
        return export_dtype(self.dtype, self.lm)

    def form_of_it(self) -> Form:
        """The form for this model."""
        return self.form.of(self.lm, self.stored_as).with_heads(self.lm, self.heads)

    def into(
        self,
        out_dir: Path,
        *,
        verify: Callable[[Path], bool] = lambda written: True,
        root: Path | None = None,
    ) -> ExportResult:
        """Write the checkpoint into ``out_dir``; one that is there stays until the new one is verified.

        ``verify(folder)`` judges what was written, before it has its name: what it refuses lies in
        ``<out_dir>.failed`` afterwards, and ``out_dir`` is as before. ``root`` is the run, inside which no
        link is followed and no folder above ``out_dir.parent`` is made.

        Raises:
            EqatError: above all when the disk is full; nothing is left behind then.
        """
        out_dir = Path(out_dir)
        form = self.form_of_it()
        if refused := form.refusal(map(self.block_for, range(self.lm.blocks))):
            raise refused
        place = ExportPlace(out_dir, root)
        with place.being_made() as partial:
            write: Callable[[Export, Path], ExportResult] = load_named(self.form.format.writer)
            result = write(self, partial)
            if verify(partial):
                place.publish()
            else:
                place.keep_as_failed()
        return replace(result, path=out_dir)


def write_folder(export: Export, directory: Path) -> ExportResult:
    """Every file of an export in Hugging Face's form, into the empty ``directory``."""
    lm = export.lm
    layout = export.form_of_it()
    assert isinstance(layout, Layout)
    room = header_room(tensor_names(layout, lm))
    writer = ShardWriter(
        directory, shard_bytes=export.shard_bytes, header_bytes=room, container=layout.container
    )
    try:
        written = _write_tensors(export, layout, writer)
        files = writer.close()
    except BaseException:
        writer.abandon()
        raise
    quantization = layout.config(written.linears)
    described = layout.described(quantization)
    dropped = write_assets(directory, lm, export.source, dtype=export.stored_as, described=described)
    for name, content in layout.files(quantization).items():
        write_json(directory / name, content)
    result = ExportResult(
        path=directory,
        format=layout.format.name,
        bytes=sum(path.stat().st_size for path in files),
        fp_bytes=lm.fp_bytes(),
        bits_per_weight=written.bits_per_weight,
        files=tuple(path.name for path in files),
        blocks_name=blocks_name(lm),
        dropped_code=dropped,
        dtype=dtype_name(export.stored_as),
    )
    loading = layout.loading(quantization, result.blocks_name)
    write_card(directory, model_card(export.card, result, written.linears, form=layout, loading=loading))
    return result


def _write_tensors(export: Export, layout: Layout, writer: ShardWriter) -> _Written:
    lm, dtype, written = export.lm, export.stored_as, _Written(layout)
    for name in outer_names(lm):
        head = export.heads.get(name.removesuffix(".weight"))
        if head is None:
            writer.add(lm.names.exported(name), stored_form(name, lm.weights.load(name), dtype))
            continue
        written.count(head)
        for key, tensor in layout.tensors(lm.names.exported_linear(name.removesuffix(".weight")), head):
            writer.add(key, tensor)
    for index, block in each_block(export):
        prefix = lm.block_prefix(index)
        for name, weight in block.linears.items():
            written.add(f"{prefix}.{name}", weight)
        layout.config(written.linears)  # what does not fit is refused before it is written
        for name, weight in block.linears.items():
            linear = lm.names.exported_linear(f"{prefix}.{name}")
            for key, tensor in layout.tensors(linear, weight):
                writer.add(key, tensor)
        for name, tensor in block.others.items():
            full = f"{prefix}.{name}"
            writer.add(lm.names.exported(full), stored_form(full, tensor, dtype))
        for name in block_buffers(lm, index):
            writer.add(lm.names.exported(name), stored_form(name, lm.weights.load(name), dtype))
    for each in layout.carried(lm):
        writer.add_as(each.name, each.dtype, each.shape, each.raw())
    return written


def each_block(export: Export) -> Iterator[tuple[int, PackedBlock]]:
    """The trained blocks one at a time, in order; each counts as done when the next is asked for.

    Raises:
        PreflightError: for a block of which not every linear is quantized.
    """
    lm = export.lm
    for index in range(lm.blocks):
        block = export.block_for(index)
        missing = set(lm.linear_names(index)) ^ set(block.linears)
        if missing:
            where = f"{lm.block_prefix(index)}.{sorted(missing)[0]}"
            raise PreflightError("linears are not all quantized", where=where)
        yield index, block
        if export.on_block is not None:
            export.on_block(index + 1, lm.blocks)


def tensor_names(form: Form, lm: CausalLM) -> Iterator[str]:
    """Every tensor name that may be written, for the room the header needs; a few too many do no harm."""
    yield from map(lm.names.exported, lm.model.state_dict())
    for name in form.heads:
        yield from form.names(name)
    for index in range(lm.blocks):
        for name in lm.linear_names(index):
            linear = form.linear_called(lm, f"{lm.block_prefix(index)}.{name}")
            yield from form.names(linear)
            yield f"{linear}.bias"
    for each in form.carried(lm):
        yield from (each.name, each.name)  # the second for a shape of more dimensions than weights have


def room_beside_tensors(form: Form, lm: CausalLM, source: ModelSource, shards: int) -> int:
    """Bytes of an export besides its tensors: headers of so many files, the tokenizer, the small files."""
    tokenizer = 0 if source.directory is None else copied_bytes(source.directory)
    network = lm.blocks * form.format.network_bytes
    return shards * header_room(tensor_names(form, lm)) + network + tokenizer + SMALL_FILES


def outer_names(lm: CausalLM) -> list[str]:
    """Tensors outside the blocks (embedding, final norm, head) in sorted order; a tied head is left out."""
    inside = blocks_name(lm) + "."
    return sorted({*lm.outer_state(), *(n for n in _stored_buffers(lm) if not n.startswith(inside))})


def block_buffers(lm: CausalLM, index: int) -> list[str]:
    """Full names of what a checkpoint stores of a block besides its parameters; nearly always nothing."""
    return [name for name in _stored_buffers(lm) if name.startswith(lm.block_prefix(index) + ".")]


def write_assets(
    directory: Path,
    lm: CausalLM,
    source: ModelSource,
    *,
    dtype: torch.dtype,
    described: Mapping[str, Any],
) -> tuple[str, ...]:
    """Configuration, which says what is ``described``, and tokenizer; returns the names of code that were
    left out of them."""
    # What writes the assets makes missing folders: a run that was deleted meanwhile must not come back so.
    with opened_folder(directory):
        source.save_assets(directory)
    modules = modules_in(directory) if source.trust_remote_code else set()
    dropped = drop_missing_code(directory, modules)
    understood, original = read_json(directory / "config.json"), source.stored_config()
    config = export_config(
        None if original is None else without_missing(original, modules, dropped),
        without_missing(understood, modules, dropped),
        # transformers 5 reads `dtype`; older readers and several engines read `torch_dtype`.
        dtype=dtype_name(dtype),
        torch_dtype=dtype_name(dtype),
        # A checkpoint that holds two different matrices is not tied, whatever its configuration said.
        tie_word_embeddings=lm.tied,
    )
    config["architectures"] = _architectures(config.get("architectures"), type(lm.model).__name__)
    write_json(directory / "config.json", {**config, **described})
    return tuple(sorted(set(dropped)))


def _architectures(said: object, ours: str) -> list[str]:
    """Classes that can read the export: those of the original, unless it was saved from one without a head
    for text, or names none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    names = [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
    return names if ours in names or set(names) & set(CAUSAL.values()) else [ours]


def write_card(directory: Path, text: str) -> None:
    """README.md of an export."""
    temporary = directory / "README.md.writing"
    write_durably(temporary, text.encode())
    temporary.replace(directory / "README.md")


def add_to_card(directory: Path, note: str) -> None:
    """A sentence that only became known when the files were read again; below everything else."""
    text = (directory / "README.md").read_text()
    write_card(directory, f"{text.rstrip()}\n\n{note[:1].upper()}{note[1:]}.\n")


def blocks_name(lm: CausalLM) -> str:
    """Where the decoder blocks are, as ``model.layers``."""
    return lm.block_prefix(0).rpartition(".")[0]


def _stored_buffers(lm: CausalLM) -> list[str]:
    parameters = {name for name, _ in lm.model.named_parameters(remove_duplicate=False)}
    return [name for name in lm.model.state_dict() if name not in parameters and name in lm.weights]
