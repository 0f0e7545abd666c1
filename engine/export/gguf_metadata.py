"""What a GGUF file says of the network: the numbers from which llama.cpp builds it.

The keys are those of llama.cpp's converter. A model that came from a GGUF file keeps what that file said,
tokenizer and template included, but for what this file is itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine import __version__
from engine.architecture.gguf_writing import full_rotary

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from engine.models.causal_lm import CausalLM

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q2_0": 41}
"""llama.cpp's number for a file most of whose matrices have one type."""
QUANTIZATION_VERSION = 2
OF_THE_FILE = ("general.architecture", "general.alignment", "general.file_type", "general.quantiz")
OTHER_TOOLS = ("split.", "quantize.")
"""Beginnings of keys that say how a file was made, and not what model it is."""


class Value(NamedTuple):
    """A value of the metadata, and its types where they cannot be seen."""

    value: Any
    kind: Any = None
    inner: Any = None


def general(kind: str, name: str, base: str, license_: str) -> dict[str, Value]:
    """What a file says of itself."""
    said = {
        "general.type": "model",
        "general.name": name,
        "general.quantized_by": f"eqat {__version__}",
        "general.license": license_,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):  # of the hub, and no path
        said |= {
            "general.base_model.count": 1,
            "general.base_model.0.name": base.rpartition("/")[2],
            "general.base_model.0.organization": base.partition("/")[0],
            "general.base_model.0.repo_url": f"https://huggingface.co/{base}",
        }
    return {key: Value(value) for key, value in said.items() if value != ""}


def network(architecture: str, lm: CausalLM) -> dict[str, Value]:
    """The numbers of a model that came with a config.json."""
    config: Any = lm.source.config
    text: dict[str, Any] = config.to_dict()
    heads = int(config.num_attention_heads)
    head_dim = int(text.get("head_dim") or config.hidden_size // heads)
    rope = full_rotary(text)
    said: dict[str, Any] = {
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "block_count": lm.blocks,
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": heads,
        "attention.head_count_kv": int(text.get("num_key_value_heads") or heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": lm.vocab_size,
    }
    if rope["rope_type"] == "linear":
        said |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if architecture in ("gemma2", "gemma3", "phi3") and text.get("sliding_window"):
        said["attention.sliding_window"] = int(text["sliding_window"])
    if architecture == "phi3":
        # llama.cpp asks for it; without scaling it is the context itself.
        said["rope.scaling.original_context_length"] = int(
            text.get("original_max_position_embeddings") or config.max_position_embeddings
        )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if architecture in ("gemma2", "gemma3") and text.get(key):
            said[key] = float(text[key])
    return {f"{architecture}.{key}": Value(value) for key, value in said.items()}


def kept(file: Path) -> dict[str, Value]:
    """Everything that a GGUF file said of its model."""
    import gguf

    found = {}
    for key, field in gguf.GGUFReader(file).fields.items():
        if key.startswith(("GGUF.", *OF_THE_FILE, *OTHER_TOOLS)):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY and len(field.types) > 1 else None
        found[key] = Value(field.contents(), kind, inner)
    return found


def add(writer: GGUFWriter, metadata: Mapping[str, Value]) -> None:
    """Hand values to what packs them."""
    from gguf import GGUFValueType

    seen: dict[type, GGUFValueType] = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    for key, (value, kind, inner) in metadata.items():
        if kind is None and isinstance(value, list):
            first = type(value[0]) if value else str
            kind = GGUFValueType.ARRAY
            inner = GGUFValueType.INT32 if first is int else seen[first]
        writer.add_key_value(key, value, kind or seen[type(value)], inner)
