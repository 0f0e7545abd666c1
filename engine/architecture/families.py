"""What a decoder block consists of, family by family.

A decoder-only Transformer is an embedding, ``blocks`` equal blocks, a final norm and a head. What a block
has of linears and norms, family by family, is in the table (:mod:`engine.architecture.family_table`). Any
other model type whose fields look like Llama's is taken for one and marked ``exact = False``. Where
safetensors headers are at hand the block's linears are read from them, so that the sizes are those of the
files, not of a formula.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set
from typing import Any

import msgspec

from engine.architecture.counting import Counted, count
from engine.architecture.family_table import ALIASES, FAMILIES, LLAMA, Family
from engine.architecture.headers import TensorInfo
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
    """All vectors outside the blocks."""
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
    other_outer_params: int = 0
    """Learned positions and projections outside the blocks."""
    carried: tuple[tuple[str, int], ...] = ()
    """Names and bytes of what the checkpoint holds besides the model, and an export takes over as it is."""
    missing: str = ""
    """A weight that the model has to have and the files do not hold."""
    coded: tuple[tuple[str, str], ...] = ()
    """The first weight that is not stored as floating-point numbers, and its type."""
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
    def head_matrices(self) -> list[tuple[int, int]]:
        """Rows and width of the embedding, and of a head of its own: what ``grid.head_bits`` quantizes. Not
        the biases of a head; and an embedding may be narrower than the blocks."""
        width = self.embed_params // max(1, self.vocab)
        return [(self.vocab, width) for count in (self.embed_params, self.head_params) if count]

    @property
    def head_weights(self) -> int:
        """Weights of both."""
        return sum(rows * width for rows, width in self.head_matrices)

    @property
    def rest_params(self) -> int:
        """Embeddings, head, final norm and what else lies outside the blocks: all of it stays 16-bit, like
        the norms and biases of blocks, but for what ``grid.head_bits`` quantizes."""
        return self.embed_params + self.head_params + self.final_norm_params + self.other_outer_params

    @property
    def carried_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.carried)

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
    table = position_table(text, {name: info.shape for name, info in (tensors or {}).items()})
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
        other_outer_params=0
        if table is None or family.stored_rows is None
        else hidden * (table.rows + family.stored_rows),
        max_positions=fields.optional_size("max_position_embeddings") or 0,
        position_table=table,
        sliding_window=fields.optional_size("sliding_window"),
        dtype_bytes=STORED_BYTES.get(
            str(text.get("dtype") or text.get("torch_dtype")).removeprefix("torch."), 2
        ),
        eager_attention=fields.get("attn_logit_softcapping", None) is not None,
        exact=model_type in FAMILIES and family.exact,
    )
    is_part = isinstance(config.get("text_config"), Mapping)
    return _with_headers(formula, tensors, is_part=is_part, asked=_asked(text)) if tensors else formula


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


def _with_headers(
    formula: Architecture, tensors: Mapping[str, TensorInfo], *, is_part: bool, asked: Set[str]
) -> Architecture:
    """Replace the formula's sizes by those that the headers describe; of blocks that differ by the
    largest's."""
    counted = count(tensors, formula.blocks, is_part=is_part, asked=asked)
    if counted is None or not counted.blocks:
        return formula
    key = max(counted.blocks, key=lambda each: _elements(counted.blocks[each]))
    block, prefix = counted.blocks[key], f"{counted.list_name}.{key}"
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
            "this tensor has no elements", where=f"{prefix}.{empty[0]}.weight", hint="download it again"
        )
    linears = tuple(
        LinearShape(name, out, into, f"{name}.bias" in block) for name, (out, into) in shapes.items()
    )
    parts = {f"{linear.name}.{part}" for linear in linears for part in ("weight", "bias")}
    # A weight of more dimensions is none that a run gets as far as counting.
    others = {name: info for name, info in block.items() if name not in parts and len(info.shape) < 3}
    largest = block[linears[0].name + ".weight"] if linears else next(iter(block.values()))
    norms = {name: info for name, info in counted.outer.items() if len(info.shape) < 2}
    tables = {name: info for name, info in counted.outer.items() if name not in norms}
    embedding = tables.pop(counted.embedding, None)
    # A tied head may be stored all the same; a head that is nowhere is the embedding.
    tied = formula.tied or not counted.head
    return msgspec.structs.replace(
        formula,
        linears=linears or formula.linears,
        norm_params_per_block=_elements(others),
        embed_params=embedding.elements if embedding else formula.embed_params,
        tied=tied,
        head_params=0 if tied else _elements(counted.head),
        final_norm_params=_elements(norms),
        other_outer_params=_elements(tables),
        carried=tuple((name, info.nbytes) for name, info in sorted(counted.carried.items())),
        dtype_bytes=STORED_BYTES.get(largest.dtype, formula.dtype_bytes),
        exact=bool(linears),
        unfit=_unfit(counted),
        from_files=True,
        # Whether a head may be absent is known where the family's defaults are.
        missing=counted.missing or ("lm_head.weight" if asked and tied and not formula.tied else ""),
        coded=tuple(itertools.islice(counted.coded(), 1)),
        block_prefix=counted.list_name,
    )


def _elements(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(info.elements for info in tensors.values())


def unfit_weight(
    tensors: Mapping[str, TensorInfo], depth: int, text: Mapping[str, Any] | None = None
) -> Unfit | None:
    """A weight in the first ``depth`` blocks that no nn.Linear has; ``text`` is the language model's
    configuration."""
    counted = count(tensors, depth, is_part=False, asked=_asked(text or {}))
    return None if counted is None else _unfit(counted)


def _asked(text: Mapping[str, Any]) -> frozenset[str]:
    """Weights and biases of the linears of a block; none where the family is not known so well."""
    family = FAMILIES.get(str(text.get("model_type", "")))
    if family is None or not family.exact:
        return frozenset()
    linears = _linears(text, family, 1, 1, 1, 1)
    biases = {f"{linear.name}.bias" for linear in linears if linear.bias}
    return frozenset({f"{linear.name}.weight" for linear in linears} | biases)


def _unfit(counted: Counted) -> Unfit | None:
    """Looked for in all blocks, for those of one model differ."""
    blocks = sorted(counted.blocks.items())
    found = [one for index, block in blocks for one in unfit_in(block, f"{counted.list_name}.{index}")]
    return first_unfit(found)
