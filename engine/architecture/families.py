"""What a decoder block consists of, family by family.

A decoder-only Transformer is an embedding, ``blocks`` equal blocks, a final norm and a head. What a block
has of linears and norms, family by family, is in the table (:mod:`engine.architecture.family_table`). Any
other model type whose fields look like Llama's is taken for one and marked ``exact = False``. Where
safetensors headers are at hand the block's linears are read from them, so that the sizes are those of the
files, not of a formula.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.architecture.family_table import ALIASES, FAMILIES, LLAMA, Family
from engine.architecture.headers import TensorInfo
from engine.architecture.leftovers import why_no_weight
from engine.architecture.limits import MOST_BLOCKS
from engine.architecture.positions import PositionTable, position_table
from engine.architecture.unfit import Unfit, first_unfit, is_norm, unfit_in
from engine.config.dtypes import DTYPE_BYTES
from engine.errors import PreflightError

HEAD_VALUES = 1 << 25
"""Logits computed at once (128 MiB in float32): a large vocabulary's of a whole text would be more than
everything else together."""
GPU_HEAD_VALUES = 1 << 26
"""On a GPU, whose products of 2000 tokens leave fewer of its processors idle than those of 1000."""


class LinearShape(msgspec.Struct, frozen=True):
    """One ``nn.Linear`` of a block."""

    name: str
    """Relative to the block, e.g. ``self_attn.q_proj``."""
    out_features: int
    in_features: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of a decoder-only model; parameters are counted, not bytes."""

    model_type: str
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """The head is the embedding matrix."""
    linears: tuple[LinearShape, ...]
    """The linears of one block."""
    norm_params_per_block: int
    embed_params: int
    head_params: int
    """0 when tied."""
    final_norm_params: int
    max_positions: int
    sliding_window: int | None = None
    eager_attention: bool = False
    """The soft cap on attention scores rules out fused attention: whole score matrices exist."""
    dtype_bytes: int = 2
    """Bytes a weight is stored with in the checkpoint, GGUF counted as the float32 it is unpacked to."""
    exact: bool = True
    """False: sizes are those of a Llama with these fields, which this model type may differ from."""
    unfit: Unfit | None = None
    """A weight of a block, seen in the files, that is not that of an ``nn.Linear``."""
    from_files: bool = False
    """The files' headers were seen, so that ``unfit`` is an answer; else only the configuration speaks."""
    position_table: PositionTable | None = None
    """None where positions are computed, so that a text of any length can be read."""
    block_prefix: str = "model.layers"

    @property
    def linear_params_per_block(self) -> int:
        return sum(linear.weights for linear in self.linears)

    @property
    def bias_params_per_block(self) -> int:
        return sum(linear.out_features for linear in self.linears if linear.bias)

    @property
    def params_per_block(self) -> int:
        return self.linear_params_per_block + self.bias_params_per_block + self.norm_params_per_block

    @property
    def rest_params(self) -> int:
        """Embeddings, head and final norm: what stays 16-bit besides the norms and biases of blocks."""
        return self.embed_params + self.head_params + self.final_norm_params

    @property
    def params(self) -> int:
        return self.blocks * self.params_per_block + self.rest_params

    def groups_per_block(self, group_size: int) -> int:
        """Scales in a block (as many as zero points)."""
        return sum(
            linear.weights // (linear.in_features if group_size == -1 else group_size)
            for linear in self.linears
        )


STORED_BYTES = {**DTYPE_BYTES, "float64": 8, "F32": 4, "F64": 8, "F16": 2, "BF16": 2}
"""Bytes of a weight, by what a configuration or a header calls its type."""


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration (Gemma 3 nests it under ``text_config``)."""
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return dict(config)
    inherited = {"model_type": f"{config.get('model_type', '')}_text"}
    inherited |= {
        key: config[key] for key in ("torch_dtype", "dtype", "tie_word_embeddings") if key in config
    }
    return {**inherited, **nested}


def architecture(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo] | None = None) -> Architecture:
    """Sizes from a config.json and, when given, the headers of the weight files."""
    text = text_config(config)
    model_type = str(text.get("model_type", ""))
    family = FAMILIES.get(model_type, LLAMA)
    fields = _Fields(text, family.defaults if model_type in FAMILIES else {}, model_type)

    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    head_dim = fields.size("head_dim", hidden // heads)
    intermediate = fields.size("intermediate_size", 4 * hidden)
    vocab = fields.size("vocab_size")
    tied = bool(fields.get("tie_word_embeddings", False))
    widths = {"hidden": hidden, "head_dim": head_dim, "q": heads * head_dim, "kv": kv_heads * head_dim}
    formula = Architecture(
        model_type=model_type,
        blocks=fields.size("num_hidden_layers"),
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        tied=tied,
        linears=_linears(text, family, hidden, intermediate, widths["q"], widths["kv"]),
        norm_params_per_block=sum(widths[name] for name in family.norms),
        embed_params=vocab * hidden,
        head_params=0 if tied else vocab * hidden,
        final_norm_params=hidden,
        max_positions=fields.optional_size("max_position_embeddings") or 0,
        position_table=position_table(text, {name: info.shape for name, info in (tensors or {}).items()}),
        sliding_window=fields.optional_size("sliding_window"),
        dtype_bytes=STORED_BYTES.get(
            str(text.get("dtype") or text.get("torch_dtype")).removeprefix("torch."), 2
        ),
        eager_attention=fields.get("attn_logit_softcapping", None) is not None,
        exact=model_type in FAMILIES and family.exact,
    )
    return _with_headers(formula, tensors) if tensors else formula


class _Fields:
    """Configuration values with aliases, the family's defaults, and one sentence when one is missing."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], model_type: str) -> None:
        self.config, self.defaults, self.model_type = config, defaults, model_type

    def get(self, name: str, default: Any) -> Any:
        for key in (name, *ALIASES.get(name, ())):
            if self.config.get(key) is not None:
                return self.config[key]
        value = self.defaults.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        # Of one entry a layer the largest decides memory.
        entries = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        numbers = [entry for entry in entries if isinstance(entry, int) and not isinstance(entry, bool)]
        if not entries or len(numbers) < len(entries) or min(numbers) <= 0:
            raise self._unusable(name)
        return max(numbers)

    def optional_size(self, name: str) -> int | None:
        """None where it is not given, null, or switched off by false, 0 or -1."""
        value = self.get(name, None)
        off = value is None or value is False or (isinstance(value, int) and value <= 0)
        return None if off else self.size(name)

    def _unusable(self, name: str) -> PreflightError:
        value = self.get(name, None)
        model_type = f"config.json of model type {self.model_type or '(none)'!r}"
        if value is None:
            return PreflightError(
                f"{model_type} has no usable {name}",
                where="model.source",
                hint="only decoder-only Transformers with Llama-like fields can be planned",
            )
        return PreflightError(
            f"{model_type} has no usable {name}: {str(value)[:80]!r} is not a whole number above zero",
            where="model.source",
            hint="correct it in config.json",
        )


def _linears(
    config: Mapping[str, Any], family: Family, hidden: int, intermediate: int, q: int, kv: int
) -> tuple[LinearShape, ...]:
    """The projections of one block, in the order of its forward pass."""
    attention_bias = bool(config.get("attention_bias", False))
    qkv_bias = attention_bias if family.qkv_bias is None else family.qkv_bias
    o_bias = attention_bias if family.qkv_bias is None else False
    mlp_bias = bool(config.get("mlp_bias", False))
    if family.fused:
        return (
            LinearShape("self_attn.qkv_proj", q + 2 * kv, hidden, qkv_bias),
            LinearShape("self_attn.o_proj", hidden, q, o_bias),
            LinearShape("mlp.gate_up_proj", 2 * intermediate, hidden, mlp_bias),
            LinearShape("mlp.down_proj", hidden, intermediate, mlp_bias),
        )
    return (
        LinearShape("self_attn.q_proj", q, hidden, qkv_bias),
        LinearShape("self_attn.k_proj", kv, hidden, qkv_bias),
        LinearShape("self_attn.v_proj", kv, hidden, qkv_bias),
        LinearShape("self_attn.o_proj", hidden, q, o_bias),
        LinearShape("mlp.gate_proj", intermediate, hidden, mlp_bias),
        LinearShape("mlp.up_proj", intermediate, hidden, mlp_bias),
        LinearShape("mlp.down_proj", hidden, intermediate, mlp_bias),
    )


IN_BLOCK = re.compile(r"^(?P<prefix>.*?\b(?:layers|h|blocks|blk))\.(?P<block>\d{1,6})\.(?P<name>.+)$")


def _with_headers(formula: Architecture, tensors: Mapping[str, TensorInfo]) -> Architecture:
    """Replace the formula's block by the largest block that the headers describe."""
    blocks = _stored_blocks(tensors)
    if not blocks:
        return formula
    key = _largest(blocks)
    block = blocks[key]
    names = [
        name.removesuffix(".weight")
        for name, info in block.items()
        if len(info.shape) == 2 and not is_norm(name)
    ]
    known = [linear.name for linear in formula.linears]
    names.sort(key=lambda name: known.index(name) if name in known else len(known))
    shapes = {name: block[name + ".weight"].shape for name in names if name + ".weight" in block}
    if empty := [name for name, shape in shapes.items() if not min(shape)]:
        raise PreflightError(
            "this tensor has no elements",
            where=f"{key[0]}.{key[1]}.{empty[0]}.weight",
            hint="download it again",
        )
    linears = tuple(
        LinearShape(name, out, into, f"{name}.bias" in block) for name, (out, into) in shapes.items()
    )
    counted = {f"{linear.name}.{part}" for linear in linears for part in ("weight", "bias")}
    norms = sum(
        info.elements
        for name, info in block.items()
        if (len(info.shape) == 1 or is_norm(name)) and name not in counted and "inv_freq" not in name
    )
    largest = block[linears[0].name + ".weight"] if linears else next(iter(block.values()))
    return msgspec.structs.replace(
        formula,
        linears=linears or formula.linears,
        norm_params_per_block=norms,
        dtype_bytes=STORED_BYTES.get(largest.dtype, formula.dtype_bytes),
        exact=bool(linears),
        unfit=unfit_weight(tensors, formula.blocks),
        from_files=True,
        block_prefix=key[0],
    )


def unfit_weight(tensors: Mapping[str, TensorInfo], depth: int) -> Unfit | None:
    """A weight in the first ``depth`` blocks that no nn.Linear has; looked for in all of them, for those of
    one model differ."""
    blocks = _stored_blocks(tensors)
    if not blocks:
        return None
    stack, _ = _largest(blocks)
    found: list[Unfit] = []
    for (prefix, index), block in sorted(blocks.items()):
        weights = {name: info for name, info in block.items() if not why_no_weight(name, info.shape)}
        if prefix == stack and index < depth:  # what comes after the last block is not asked for
            found += unfit_in(weights, f"{prefix}.{index}")
    return first_unfit(found)


def _stored_blocks(tensors: Mapping[str, TensorInfo]) -> dict[tuple[str, int], dict[str, TensorInfo]]:
    """The tensors of each block, by the name of its stack and its number."""
    blocks: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if (match := IN_BLOCK.match(name)) and "vision" not in name and int(match["block"]) < MOST_BLOCKS:
            blocks.setdefault((match["prefix"], int(match["block"])), {})[match["name"]] = info
    return blocks


def _largest(blocks: Mapping[tuple[str, int], Mapping[str, TensorInfo]]) -> tuple[str, int]:
    return max(blocks, key=lambda each: sum(info.elements for info in blocks[each].values()))
