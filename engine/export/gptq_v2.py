"""GPTQ v2: the packed checkpoint that most loaders of 2, 3, 4 and 8-bit asymmetric weights read.

Each quantized linear ``w[o, i] = (q[o, i] - z[o, g]) * s[o, g]`` becomes ``qweight``, ``qzeros``, ``scales``
and ``g_idx`` (layout in ``reader.py``); everything else stays a 16-bit tensor under its own name. What makes
it version 2 is that zero points are stored as they are. Version 1 stores ``z - 1``, which has no field value
for ``z = 0``, and training produces ``z = 0`` often.

The integers come from training and are written as they are: nothing is dequantized and rounded again. Our own
packed words run along the input dimension with the same bit stream, so ``qweight`` is their transpose.

Blocks are asked for one at a time and their tensors appended to the open shard, so an export holds one block.
The directory is built and verified under another name and takes its own when that is done (``place.py``).

Left out: activation order (``desc_act``), quantized heads, and version 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine import __version__
from engine.architecture.links import TOKENIZER_FILES
from engine.errors import PreflightError
from engine.export.card import model_card
from engine.export.named_code import drop_missing_code, modules_in, without_missing
from engine.export.place import ExportPlace
from engine.export.reader import read_json
from engine.export.shards import ShardWriter, header_room, write_durably, write_json
from engine.quant.packed import PackedBlock, PackedWeight
from engine.quant.packing import bitpack
from engine.system.guarded import opened_folder

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM
    from engine.models.source import ModelSource

FORMAT = "gptq_v2"
SMALL_FILES = 64 << 10
"""Bytes that model card, configuration and the tokenizer of a random model take at most."""
_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx", "bias")


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    path: Path
    format: str
    bytes: int
    """Size of the safetensors files."""
    fp_bytes: int
    """Size of the same model with every parameter at 16 bits."""
    bits_per_weight: float
    """Integers, scales and zero points of the quantized linears, in bits per weight."""
    files: tuple[str, ...]
    """Safetensors files, in order."""
    blocks_name: str
    """Where the decoder blocks are, as ``model.layers``."""
    dropped_code: tuple[str, ...] = ()
    """Names of code in the model's own JSON files that were left out, because the code is not there."""


@dataclass
class _Grid:
    """The one grid all linears share, learned from the blocks as they pass."""

    bits: int = 0
    symmetric: bool = False
    group_sizes: tuple[int, ...] = ()
    whole_rows: bool = True
    packed_bits: int = 0
    weights: int = 0

    def add(self, name: str, weight: PackedWeight) -> None:
        if self.bits and (weight.bits, weight.grid.symmetric) != (self.bits, self.symmetric):
            raise PreflightError(
                f"has {weight.bits} bits, symmetric={weight.grid.symmetric}, other layers {self.bits} bits, "
                f"symmetric={self.symmetric}; gptq_v2 holds one grid for the whole model",
                where=name,
            )
        self.bits, self.symmetric = weight.bits, weight.grid.symmetric
        self.group_sizes = tuple(sorted({*self.group_sizes, weight.group_size}))
        self.whole_rows = self.whole_rows and weight.group_size == weight.in_features
        self.packed_bits += weight.words.numel() * 32 + weight.scale.numel() * (16 + weight.bits)
        self.weights += weight.out_features * weight.in_features

    @property
    def group_size(self) -> int:
        """The configured group size; rows of different length that are one group each are ``-1``."""
        if len(self.group_sizes) == 1:
            return self.group_sizes[0]
        if self.whole_rows:
            return -1
        raise PreflightError(
            f"group sizes {self.group_sizes} are mixed; gptq_v2 holds one for the whole model"
        )


def export_gptq_v2(
    out_dir: Path,
    lm: CausalLM,
    source: ModelSource,
    block_for: Callable[[int], PackedBlock],
    *,
    shard_bytes: int,
    card: dict[str, Any],
    on_block: Callable[[int, int], None] | None = None,
    verify: Callable[[Path], bool] = lambda written: True,
    root: Path | None = None,
) -> ExportResult:
    """Write the packed checkpoint into ``out_dir``; one that is there stays until the new one is verified.

    ``block_for(i)`` is asked once for each block, in order. ``card`` is described in ``card.py``.
    ``on_block(done, blocks)`` reports progress and may raise to stop; nothing is left behind then.
    ``verify(folder)`` judges what was written, before it has its name: what it refuses lies in
    ``<out_dir>.failed`` afterwards, and ``out_dir`` is as before. ``root`` is the run, inside which no link
    is followed and no folder above ``out_dir.parent`` is made.

    Raises:
        EqatError: above all when the disk is full; nothing is left behind then.
    """
    out_dir = Path(out_dir)
    place = ExportPlace(out_dir, root)
    with place.being_made() as partial:
        result = _write(partial, out_dir, lm, source, block_for, shard_bytes, card, on_block)
        if verify(partial):
            place.publish()
        else:
            place.keep_as_failed()
    return result


def room_beside_tensors(lm: CausalLM, source: ModelSource, shards: int) -> int:
    """Bytes of an export besides its tensors: headers of so many files, the tokenizer, the small files."""
    tokenizer = 0
    if source.directory is not None:
        for name in TOKENIZER_FILES:
            with suppress(OSError):
                tokenizer += (source.directory / name).stat().st_size
    return shards * header_room(_all_names(lm)) + tokenizer + SMALL_FILES


def quantization_config(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """The object loaders read from ``config.json`` (and from ``quantize_config.json``)."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": FORMAT,
        "format": FORMAT,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"eqat:{__version__}"]},
    }


def packed_tensors(prefix: str, weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
    """The four tensors that replace ``<prefix>.weight``."""
    if weight.out_features * weight.bits % 32:
        raise PreflightError(
            f"{weight.out_features} output channels of {weight.bits} bits do not fill whole 32-bit words, "
            "which gptq_v2 needs for the zero points",
            where=prefix,
            hint="choose 8 bits, or 4 when the outputs are a multiple of 8",
        )
    scale_GO = weight.scale.t().to(torch.float16)
    if not torch.isfinite(scale_GO).all():
        raise PreflightError("a scale does not fit float16", where=prefix)
    yield f"{prefix}.qweight", weight.words.t().contiguous()
    yield f"{prefix}.qzeros", bitpack(weight.zero_point.t().contiguous(), weight.bits, dim=1)
    yield f"{prefix}.scales", scale_GO.contiguous()
    yield f"{prefix}.g_idx", torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size


def half(name: str, tensor: Tensor) -> Tensor:
    """float16, or an error where the value would become infinite."""
    value = tensor.detach().to(torch.float16)
    if not torch.isfinite(value).all():
        largest = tensor.detach().float().abs().max().item()
        raise PreflightError(f"holds {largest:.4g}, which float16 cannot", where=name)
    return value


def stored_form(name: str, tensor: Tensor) -> Tensor:
    """How a tensor that is not quantized is stored: numbers as float16, counters and masks as they are."""
    return half(name, tensor) if tensor.is_floating_point() else tensor.detach()


def outer_names(lm: CausalLM) -> list[str]:
    """Tensors outside the blocks (embedding, final norm, head) in sorted order; a tied head is left out."""
    inside = _blocks_name(lm) + "."
    return sorted({*lm.outer_state(), *(n for n in _stored_buffers(lm) if not n.startswith(inside))})


def block_buffers(lm: CausalLM, index: int) -> list[str]:
    """Full names of what a checkpoint stores of a block besides its parameters; nearly always nothing."""
    return [name for name in _stored_buffers(lm) if name.startswith(lm.block_prefix(index) + ".")]


def auto_round_config(quantization: dict[str, Any], blocks_name: str) -> dict[str, Any]:
    """What auto-round reads in ``config.json`` for the same tensors; ``blocks_name`` as ``model.layers``."""
    return {
        "quant_method": "auto-round",
        "bits": quantization["bits"],
        "group_size": quantization["group_size"],
        "sym": quantization["sym"],
        "data_type": "int",
        "packing_format": "auto_round:gptqmodel",
        "autoround_version": "0.16.1",
        "block_name_to_quantize": blocks_name,
    }


def write_card(directory: Path, result: ExportResult, card: dict[str, Any]) -> None:
    """Write ``README.md``."""
    quantization = read_json(directory / "quantize_config.json")
    auto_round = auto_round_config(quantization, result.blocks_name)
    text = model_card(card, result=result, quantization=quantization, auto_round=auto_round)
    temporary = directory / "README.md.writing"
    write_durably(temporary, text.encode())
    temporary.replace(directory / "README.md")


def _write(
    directory: Path,
    out_dir: Path,
    lm: CausalLM,
    source: ModelSource,
    block_for: Callable[[int], PackedBlock],
    shard_bytes: int,
    card: dict[str, Any],
    on_block: Callable[[int, int], None] | None,
) -> ExportResult:
    """Every file of the export that will be ``out_dir``, into the empty ``directory``."""
    writer = ShardWriter(directory, shard_bytes=shard_bytes, header_bytes=header_room(_all_names(lm)))
    try:
        grid = _write_tensors(writer, lm, block_for, on_block)
        files = writer.close()
    except BaseException:
        writer.abandon()
        raise
    dropped = _write_assets(directory, lm, source, grid)
    result = ExportResult(
        path=out_dir,
        format=FORMAT,
        bytes=sum(path.stat().st_size for path in files),
        fp_bytes=lm.fp_bytes(),
        bits_per_weight=grid.packed_bits / max(1, grid.weights),
        files=tuple(path.name for path in files),
        blocks_name=_blocks_name(lm),
        dropped_code=dropped,
    )
    write_card(directory, result, card)
    return result


def _write_tensors(
    writer: ShardWriter,
    lm: CausalLM,
    block_for: Callable[[int], PackedBlock],
    on_block: Callable[[int, int], None] | None,
) -> _Grid:
    for name in outer_names(lm):
        writer.add(name, stored_form(name, lm.weights.load(name)))
    grid = _Grid()
    for index in range(lm.blocks):
        block, prefix = block_for(index), lm.block_prefix(index)
        missing = set(lm.linear_names(index)) ^ set(block.linears)
        if missing:
            raise PreflightError("linears are not all quantized", where=f"{prefix}.{sorted(missing)[0]}")
        for name, weight in block.linears.items():
            grid.add(f"{prefix}.{name}", weight)
            for key, tensor in packed_tensors(f"{prefix}.{name}", weight):
                writer.add(key, tensor)
        for name, tensor in block.others.items():
            writer.add(f"{prefix}.{name}", half(f"{prefix}.{name}", tensor))
        for name in block_buffers(lm, index):
            writer.add(name, stored_form(name, lm.weights.load(name)))
        if on_block is not None:
            on_block(index + 1, lm.blocks)
    return grid


def _write_assets(directory: Path, lm: CausalLM, source: ModelSource, grid: _Grid) -> tuple[str, ...]:
    """Configuration and tokenizer; returns the names of code that were left out of them."""
    # What writes the assets makes missing folders: a run that was deleted meanwhile must not come back so.
    with opened_folder(directory):
        source.save_assets(directory)
    modules = modules_in(directory) if source.trust_remote_code else set()
    dropped = drop_missing_code(directory, modules)
    config = without_missing(_original_config(directory, source), modules, dropped)
    config.setdefault("architectures", [type(lm.model).__name__])
    # transformers 5 reads `dtype`; older readers and several engines read `torch_dtype`.
    config["dtype"] = config["torch_dtype"] = "float16"
    # A checkpoint that holds two different matrices is not tied, whatever its configuration said.
    config["tie_word_embeddings"] = lm.tied
    _name_rope_as_before(config)
    quantization = quantization_config(grid.bits, grid.group_size, grid.symmetric)
    write_json(directory / "config.json", {**config, "quantization_config": quantization})
    write_json(directory / "quantize_config.json", quantization)
    return tuple(sorted(set(dropped)))


def _original_config(directory: Path, source: ModelSource) -> dict[str, Any]:
    """config.json as its authors wrote it; what transformers would write again lacks every default."""
    rewritten = read_json(directory / "config.json")
    original = source.stored_config()
    if original is None:
        return rewritten
    # Of a multimodal model only the language model is quantized, and only its part is written.
    return original if original.get("model_type") == rewritten.get("model_type") else rewritten


def _name_rope_as_before(config: dict[str, Any]) -> None:
    """Repeat transformers 5's ``rope_parameters`` under the names that version 4 and other engines read.

    Without them those fall back to a base of 10000, and the model talks nonsense without an error.
    """
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            config.setdefault("rope_scaling", scaling)


def _blocks_name(lm: CausalLM) -> str:
    return lm.block_prefix(0).rpartition(".")[0]


def _stored_buffers(lm: CausalLM) -> list[str]:
    parameters = {name for name, _ in lm.model.named_parameters(remove_duplicate=False)}
    return [name for name in lm.model.state_dict() if name not in parameters and name in lm.weights]


def _all_names(lm: CausalLM) -> Iterator[str]:
    """Every tensor name that may be written, for the room the header needs; a few too many do no harm."""
    yield from lm.model.state_dict()
    for index in range(lm.blocks):
        for name in lm.linear_names(index):
            for suffix in _SUFFIXES:
                yield f"{lm.block_prefix(index)}.{name}.{suffix}"
