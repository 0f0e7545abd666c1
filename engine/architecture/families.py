"""What a decoder block consists of, family by family.

A decoder-only Transformer is an embedding, ``blocks`` equal blocks, a final norm and a head. For every
family that the engine is tested with, :data:`FAMILIES` states which linears a block has and how large
its norms are; the defaults there are those of transformers' configuration classes, because a
config.json leaves out every field that has its default. Any other model type whose fields look like
Llama's is taken for one and marked ``exact = False``. Where safetensors headers are at hand the block's
linears are read from them, so that the sizes are those of the files, not of a formula.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.architecture.counting import count
from engine.architecture.headers import TensorInfo
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
    fused: tuple[str, ...] = ()
    """3-D weights seen in the checkpoint: fused experts, which are not linears."""
    other_outer_params: int = 0
    """Learned positions and projections outside the blocks."""
    carried: tuple[tuple[str, int], ...] = ()
    """Names and bytes of what the checkpoint holds besides the model, and an export takes over as it is."""
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
    def rest_params(self) -> int:
        """Embeddings, head, final norm and what else lies outside the blocks: all of it stays 16-bit, as do the
        norms and biases of blocks."""
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


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """How a model type differs from Llama, and the defaults of its configuration class."""

    defaults: dict[str, Any]
    qkv_bias: bool | None = None
    """None: the field ``attention_bias`` decides, for the output projection too."""
    norms: tuple[str, ...] = ("hidden", "hidden")
    """Width of every norm in a block: hidden, head_dim (per-head), q or kv (over all heads)."""
    fused: bool = False
    """One linear for q, k, v and one for gate and up."""


def _defaults(sizes: str, *, head_dim: int | None = None, tied: bool = False) -> dict[str, Any]:
    """Six sizes in the order of transformers' signatures, as a configuration."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    *values, kv_heads = (None if size == "-" else int(size) for size in sizes.split())
    fields: dict[str, Any] = dict(zip(names, values, strict=True))
    return {**fields, "num_key_value_heads": kv_heads, "head_dim": head_dim, "tie_word_embeddings": tied}


LLAMA = Family(defaults=_defaults("32000 4096 11008 32 32 -"))
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": Family(defaults=_defaults("32000 4096 14336 32 32 8"), qkv_bias=False),
    "qwen2": Family(defaults=_defaults("151936 4096 22016 32 32 32"), qkv_bias=True),
    "qwen3": Family(
        defaults=_defaults("151936 4096 22016 32 32 32", head_dim=128),
        norms=("hidden", "hidden", "head_dim", "head_dim"),
    ),
    "gemma2": Family(
        defaults=_defaults("256000 2304 9216 26 8 4", head_dim=256, tied=True)
        | {"attn_logit_softcapping": 50.0},
        norms=("hidden",) * 4,
    ),
    "gemma3_text": Family(
        defaults=_defaults("262208 2304 9216 26 8 4", head_dim=256, tied=True),
        norms=("hidden",) * 4 + ("head_dim",) * 2,
    ),
    "phi3": Family(defaults=_defaults("32064 3072 8192 32 32 -"), qkv_bias=False, fused=True),
    "olmo2": Family(defaults=_defaults("50304 4096 11008 32 32 -"), norms=("hidden", "hidden", "q", "kv")),
    "smollm3": Family(defaults=_defaults("128256 2048 11008 36 16 4", tied=True)),
}

ALIASES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_sequence_length"),
}
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
        sliding_window=fields.optional_size("sliding_window"),
        dtype_bytes=STORED_BYTES.get(
            str(text.get("dtype") or text.get("torch_dtype")).removeprefix("torch."), 2
        ),
        eager_attention=fields.get("attn_logit_softcapping", None) is not None,
        exact=model_type in FAMILIES,
    )
    is_part = isinstance(config.get("text_config"), Mapping)
    return _with_headers(formula, tensors, is_part=is_part) if tensors else formula


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
        return PreflightError(
            f"config.json of model type {self.model_type or '(none)'!r} has no usable {name}",
            where="model.source",
            hint="only decoder-only Transformers with Llama-like fields can be planned",
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


def _with_headers(formula: Architecture, tensors: Mapping[str, TensorInfo], *, is_part: bool) -> Architecture:
    """Replace the formula's sizes by those that the headers describe; of blocks that differ by the
    largest's."""
    counted = count(tensors, formula.blocks, is_part=is_part)
    if counted is None or not counted.blocks:
        return formula
    key = max(counted.blocks, key=lambda each: sum(info.elements for info in counted.blocks[each].values()))
    block, prefix = counted.blocks[key], f"{counted.list_name}.{key}"
    names = [name.removesuffix(".weight") for name, info in block.items() if len(info.shape) == 2]
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
    fused = [name for name, info in block.items() if len(info.shape) == 3]
    largest = block[linears[0].name + ".weight"] if linears else next(iter(block.values()))
    norms = {name: info for name, info in counted.outer.items() if len(info.shape) < 2}
    tables = {name: info for name, info in counted.outer.items() if name not in norms}
    embedding = tables.pop(counted.embedding, None)
    # A tied head may be stored all the same; a head that is nowhere is the embedding.
    tied = formula.tied or not counted.head
    return msgspec.structs.replace(
        formula,
        linears=linears or formula.linears,
        norm_params_per_block=_elements(
            {name: info for name, info in block.items() if name not in parts and name not in fused}
        ),
        embed_params=embedding.elements if embedding else formula.embed_params,
        tied=tied,
        head_params=0 if tied else _elements(counted.head),
        final_norm_params=_elements(norms),
        other_outer_params=_elements(tables),
        carried=tuple((name, info.nbytes) for name, info in counted.carried.items()),
        dtype_bytes=STORED_BYTES.get(largest.dtype, formula.dtype_bytes),
        exact=bool(linears),
        fused=tuple(f"{prefix}.{name}" for name in fused),
        coded=tuple(itertools.islice(counted.coded(), 1)),
        block_prefix=counted.list_name,
    )


def _elements(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(info.elements for info in tensors.values())
