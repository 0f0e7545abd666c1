"""The table of model families: what their blocks have, and how they differ from Llama.

Every family that the engine is tested with has a row (``docs/families.md`` has what the tests found). The
defaults are those of transformers' configuration classes, because a config.json may leave out every field
that has its default. What cannot be quantized in a family is no row of this table, but of
:mod:`engine.architecture.refusals`.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """How a model type differs from Llama, and the defaults of its configuration class."""

    defaults: dict[str, Any]
    qkv_bias: bool | None = None
    """None: the field ``attention_bias`` decides, for the output projection too."""
    norms: tuple[str, ...] = ("hidden", "hidden")
    """Width of every norm in a block: hidden, head_dim (per-head), q or kv (over all heads)."""
    fused: bool = False
    """One linear for q, k, v and one for gate and up."""
    exact: bool = True
    """False: its blocks differ from this row. Where there are files, sizes are read from their headers."""
    position_table: str = ""
    """The field that says how many rows its table of positions has: no longer text can be read. Empty for
    families that compute positions (rotary tables, slopes) for any length."""
    stored_rows: int | None = None
    """Rows of that table beyond the positions, where it is a stored weight; none where it is computed."""


def _defaults(sizes: str, *, head_dim: int | None = None, tied: bool = False) -> dict[str, Any]:
    """Six sizes in the order of transformers' signatures, as a configuration."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    *values, kv_heads = (None if size == "-" else int(size) for size in sizes.split())
    fields: dict[str, Any] = dict(zip(names, values, strict=True))
    return {**fields, "num_key_value_heads": kv_heads, "head_dim": head_dim, "tie_word_embeddings": tied}


def _alike(sizes: str, *, head_dim: int | None = None, tied: bool = False) -> Family:
    """A family that works like Llama; what is in its blocks is read from the files."""
    return Family(defaults=_defaults(sizes, head_dim=head_dim, tied=tied), exact=False)


def _of_table(
    field: str, positions: int, sizes: str, *, tied: bool = False, stored_rows: int | None = None
) -> Family:
    """A family with a table of so many positions."""
    defaults = _defaults(sizes, tied=tied) | {"max_position_embeddings": positions}
    return Family(defaults=defaults, exact=False, position_table=field, stored_rows=stored_rows)


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
    # What follows is tested as a whole and block by block, and its sizes come from the files.
    "apertus": _alike("131072 4096 14336 32 32 32"),
    "arcee": _alike("32000 2560 18432 32 32 32"),
    "bitnet": _alike("128256 2560 6912 30 20 5"),
    "bloom": _alike("250880 64 - 2 8 -", tied=True),
    "cohere": _alike("256000 8192 22528 40 64 64", tied=True),
    "cohere2": _alike("256000 8192 22528 40 64 64", tied=True),
    "cwm": _alike("128256 6144 21504 64 48 8", head_dim=128),
    "diffllama": _alike("32000 2048 8192 16 32 32"),
    "doge": _alike("32768 1024 2048 32 8 8"),
    "ernie4_5": _alike("103424 1024 3072 18 16 2", head_dim=128, tied=True),
    "exaone4": _alike("102400 4096 16384 32 32 32"),
    "falcon": _alike("65024 4544 - 32 71 -", tied=True),
    "gemma": _alike("256000 3072 24576 28 16 16", head_dim=256, tied=True),
    "gemma4_text": _alike("262144 2304 9216 30 8 4", head_dim=256, tied=True),
    "glm": _alike("151552 4096 13696 40 32 2", head_dim=128),
    "glm4": _alike("151552 4096 13696 40 32 2", head_dim=128),
    "gpt_neox": _alike("50432 6144 24576 44 64 -"),
    "granite": _alike("32000 4096 11008 32 32 32"),
    "granite_swa": _alike("100352 2560 8192 24 20 4", tied=True),
    "helium": _alike("48000 2560 7040 24 20 20", head_dim=128),
    "hunyuan_v1_dense": _alike("290943 4096 11008 32 32 32"),
    "hyperclovax": _alike("32000 4096 11008 32 32 32"),
    "internlm3": _alike("128512 4096 11008 32 32 32"),
    "jais2": _alike("150272 3328 26624 32 26 26", head_dim=128),
    "minicpm3": _alike("73448 2560 6400 62 40 40", tied=True),
    "ministral": _alike("32000 4096 14336 32 32 8"),
    "ministral3": _alike("131072 4096 14336 34 32 8", head_dim=128),
    "moshi": _alike("32000 4096 22528 32 32 32"),
    "nanochat": _alike("50304 768 8192 12 6 6"),
    "nemotron": _alike("256000 6144 24576 32 48 -"),
    "olmo": _alike("50304 4096 11008 32 32 32"),
    "olmo3": _alike("50304 4096 11008 32 32 32"),
    "persimmon": _alike("262144 4096 16384 36 64 -"),
    "phi": _alike("51200 2048 8192 24 32 32"),
    "seed_oss": _alike("155136 4096 27648 64 80 8", head_dim=128),
    "stablelm": _alike("50304 2560 6912 32 32 32"),
    "starcoder2": _alike("49152 3072 12288 30 24 2", tied=True),
    "vaultgemma": _alike("256000 2304 9216 26 8 4", head_dim=256, tied=True),
    "xglm": _alike("256008 1024 4096 24 16 -", tied=True),
    "youtu": _alike("128256 2048 6144 32 16 16", tied=True),
    # Their positions come from a table; that of XGLM, above, grows.
    "biogpt": _of_table("max_position_embeddings", 1024, "42384 1024 4096 24 16 -", tied=True, stored_rows=2),
    "ctrl": _of_table("n_positions", 256, "246534 1280 8192 48 16 -", tied=True),
    "codegen": _of_table("n_positions", 2048, "50400 4096 - 28 16 -"),
    "gpt_bigcode": _of_table("n_positions", 1024, "50257 768 - 12 12 1", tied=True, stored_rows=0),
    "gpt_neo": _of_table("max_position_embeddings", 2048, "50257 2048 - 24 16 -", tied=True, stored_rows=0),
    "gptj": _of_table("n_positions", 2048, "50400 4096 - 28 16 -"),
    "mpt": _of_table("max_seq_len", 2048, "50368 2048 - 24 16 -", tied=True),
    "opt": _of_table("max_position_embeddings", 2048, "50272 768 3072 12 12 -", tied=True, stored_rows=2),
}

ALIASES = {
    "hidden_size": ("n_embd", "n_embed", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "dff"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "max_sequence_length"),
}
"""Names that families have for what most call by the first."""
