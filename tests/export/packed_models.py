"""Small models with trained-looking integers, for tests of what is written and read back.

Zero points 0 and the maximum occur in every matrix: they are what packing gets wrong first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config.grid import Grid, GridConfig
from engine.config.model import ModelConfig
from engine.export.checkpoint import Export
from engine.export.layout import Layout, layout_of
from engine.export.reader import CheckpointReader, packed_model
from engine.export.result import ExportResult
from engine.export.stored import NO_HEADS, as_stored, export_dtype, outer_as_stored
from engine.export.verify import VerifyResult, verify
from engine.methods.blockwise.rtn import round_matrix
from engine.models.causal_lm import CausalLM
from engine.models.heads import head_names
from engine.models.source import ModelSource
from engine.models.tokenizer import byte_tokenizer
from engine.quant.packed import PackedBlock, PackedWeight

VOCAB = 320
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_model(directory: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A random full-precision checkpoint with a tokenizer and a generation configuration."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms other than one, biases other than zero: otherwise losing them passes
            parameter.data = torch.randn_like(parameter) * 0.1 + ("norm" in name)
    model.save_pretrained(directory)
    byte_tokenizer(VOCAB).save_pretrained(directory)
    return directory


def open_model(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[ModelSource, CausalLM]:
    source = ModelSource.open(ModelConfig(source=str(directory)))
    return source, CausalLM(source, torch.device("cpu"), dtype)


def random_weight(
    out: int, inp: int, bits: int, group: int, symmetric: bool, seed: int, fixed: int | None = None
) -> PackedWeight:
    """Random integers over the whole range, with a spread that keeps a network's activations alive."""
    draw = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else inp // group
    top = 2**bits - 1
    codes = torch.randint(0, top + 1, (out, inp), generator=draw, dtype=torch.uint8)
    grid = Grid(bits, group, symmetric, fixed)
    if grid.fixed_zero_point is not None:
        zero = torch.full((out, groups), grid.fixed_zero_point, dtype=torch.uint8)
        side = torch.where(torch.rand(out, groups, generator=draw) < 0.3, -1.0, 1.0)
    else:
        zero = torch.randint(0, top + 1, (out, groups), generator=draw, dtype=torch.uint8)
        zero[0, 0], zero[1, 0] = 0, top
        zero[2, -1], zero[3, -1] = top, 0
        side = torch.ones(out, groups)
    scale = side * (0.5 + torch.rand(out, groups, generator=draw)) * (1.2 / (top * inp**0.5))
    return PackedWeight.from_codes(codes, scale, zero, grid)


def packed_blocks(
    lm: CausalLM, bits: int, group: int, symmetric: bool = False, fixed: int | None = None
) -> list[PackedBlock]:
    """Every block with random integers, and norms that differ from the checkpoint's as after training."""
    blocks = []
    for index in range(lm.blocks):
        module = lm.load_block(index)
        linears = {}
        for number, name in enumerate(lm.linear_names(index)):
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            seed = 100 * index + number
            linears[name] = random_weight(
                linear.out_features, linear.in_features, bits, group, symmetric, seed, fixed
            )
        own = {f"{name}.weight" for name in linears}
        others = {n: p.detach() * 1.01 for n, p in module.named_parameters() if n not in own}
        blocks.append(PackedBlock(linears, others))
    return blocks


def rounded_heads(lm: CausalLM, bits: int, group: int, fixed: bool = False) -> dict[str, PackedWeight]:
    """Embedding and head, as ``grid.head_bits`` has them; with ``fixed`` zero points, or free ones."""
    grid = GridConfig(head_bits=bits, group_size=group, zero_point="fixed" if fixed else "learned").head
    assert grid is not None
    return {
        name: round_matrix(lm.weights.load(f"{name}.weight"), grid, method="search", norm=2.5)
        for name in head_names(lm)
    }


GPTQ_V2 = layout_of("gptq_v2")


def write(
    out: Path,
    lm: CausalLM,
    source: ModelSource,
    block_for: Callable[[int], PackedBlock],
    *,
    layout: Layout = GPTQ_V2,
    shard_bytes: int = 1 << 30,
    card: dict[str, Any] | None = None,
    dtype: str = "auto",
    on_block: Callable[[int, int], None] | None = None,
    heads: Mapping[str, PackedWeight] = NO_HEADS,
) -> ExportResult:
    """Export blocks of a model in one layout."""
    made = Export(
        form=layout,
        lm=lm,
        source=source,
        block_for=block_for,
        shard_bytes=shard_bytes,
        card=card or {},
        dtype=dtype,
        on_block=on_block,
        heads=heads,
    )
    return made.into(out)


def compare(
    directory: Path,
    lm: CausalLM,
    block_for: Callable[[int], PackedBlock],
    ids: torch.Tensor,
    layout: Layout = GPTQ_V2,
    dtype: str = "auto",
    heads: Mapping[str, PackedWeight] = NO_HEADS,
) -> VerifyResult:
    """Verify an export."""
    return verify(directory, layout, lm, block_for, ids, dtype=dtype, heads=heads)


def reader_of(directory: Path) -> CheckpointReader:
    return GPTQ_V2.reader(directory)


def reload(directory: Path, layout: Layout = GPTQ_V2) -> CausalLM:
    """The model in an export."""
    return packed_model(directory, layout.reader, torch.device("cpu"), torch.float32)


def export(
    directory: Path,
    out: Path,
    bits: int,
    group: int,
    symmetric: bool = False,
    *,
    shard_bytes: int = 1 << 30,
    card: dict[str, Any] | None = None,
) -> tuple[CausalLM, list[PackedBlock], ExportResult]:
    """Quantize a saved model with random integers and export it."""
    source, lm = open_model(directory)
    blocks = packed_blocks(lm, bits, group, symmetric)
    result = write(
        out, lm, source, blocks.__getitem__, shard_bytes=shard_bytes, card=card or {"command": "eqat run x"}
    )
    return lm, blocks, result


def logits(lm: CausalLM, block_for: Callable[[int], nn.Module], ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits of the model made of these blocks."""
    with torch.no_grad():
        hidden = lm.embed(ids_BT)
        for index in range(lm.blocks):
            hidden = lm.run_block(block_for(index), index, hidden)
        return lm.head(hidden)


def trained_logits(
    lm: CausalLM,
    blocks: list[PackedBlock],
    ids_BT: torch.Tensor,
    asked: str = "auto",
    heads: Mapping[str, PackedWeight] = NO_HEADS,
) -> torch.Tensor:
    """With the values that an export has of what is not quantized; ``asked`` is ``export.dtype``."""
    dtype = export_dtype(asked, lm)

    def stored(index: int) -> PackedBlock:
        return as_stored(blocks[index], dtype, lm.block_prefix(index))

    with outer_as_stored(lm, dtype, heads):
        return logits(lm, lambda index: stored(index).install(lm.load_block(index)), ids_BT)


def some_ids(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))
