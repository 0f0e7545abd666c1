"""What a GGUF file can hold of a model: its architecture, the type of its blocks, how many bytes.

llama.cpp computes a network from the name of its architecture, a few numbers of the metadata and the
tensors; everything else of it is in its code. So a model whose configuration asks for something that neither
the numbers say nor the code does would be another model in such a file: it is refused here, by the field.

The type of a linear follows from its grid alone, so that the plan knows the size of the file before anything
is trained, and a file is what its name says::

    Q2_0   (q - 1) * d,  q in 0..3      2 bits with fixed zero points, in groups that 64 divides
    Q4_0   (q - 8) * d,  q in 0..15     2 and 3 bits whatever the zero points are; 4 bits with fixed ones
    Q4_1   q * d + m,    q in 0..15     4 bits else; of it only m, the bias of a group, is rounded
    Q8_0   q * d,        q in -128..127 8 bits with fixed zero points

Of 2 and 3 bits the difference of an integer and a zero point is at most 3 or 7, so it fits Q4_0 as it is: no
group needs a bias. Types whose groups share a scale among them (Q2_K, Q3_K, Q4_K) hold no free scale of 64 or
128 weights, and are not written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.architecture.families import Architecture, text_config
from engine.architecture.gguf_header import GGML_TYPES, GGUF_MODEL_TYPES
from engine.config.dtypes import DTYPE_BYTES
from engine.config.grid import Grid, GridConfig

ARCHITECTURES = {
    **{model_type: name for name, model_type in GGUF_MODEL_TYPES.items()},
    "mistral": "llama",
}
"""llama.cpp's name of an architecture, by transformers' model type: those of the reader, and one more."""

TYPE_IDS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
PLAIN_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""GGUF's name of what matrices that are not quantized are stored in, by ``export.dtype``."""

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of Llama 3.1 to 3.3; other limits cannot be told from the file, which stores the result."""
GEMMA3_LOCAL_THETA = 10000.0
"""Rotary base of Gemma 3's sliding-window layers; the same in all sizes and not stored in the file."""
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of the two Gemmas whose attention is scaled by hidden/heads rather than by the head's size."""
SLIDING_PATTERN = {"gemma2": 2, "gemma3": 6}
"""One layer in so many sees the whole context, the last of them."""


def block_type(grid: Grid, inputs: int) -> str:
    """GGUF's name for the type that holds a linear; empty where none does."""
    group = inputs if grid.group_size == -1 else grid.group_size
    if grid.bits == 2 and grid.fixed_zero_point is not None and group % 64 == 0:
        return "Q2_0"
    if grid.bits in (2, 3) or (grid.bits == 4 and grid.symmetric):
        return "Q4_0"
    if grid.bits == 4:
        return "Q4_1"
    return "Q8_0" if grid.symmetric else ""


def block_bytes(kind: str, weights: int) -> int:
    """Bytes of so many weights, whole rows of them."""
    _, each, size = GGML_TYPES[TYPE_IDS[kind]]
    return weights // each * size


def tensor_bytes(arch: Architecture, grid: GridConfig, number: int) -> int:
    """Bytes of all tensors; ``number`` of each number of an embedding or a head, vectors are float32."""
    linears = sum(
        block_bytes(block_type(grid.shared, linear.in_features), linear.weights) for linear in arch.linears
    )
    vectors = 4 * (arch.bias_params_per_block + arch.norm_params_per_block)
    heads = number * (arch.embed_params + arch.head_params)
    if grid.head is not None:
        heads -= number * arch.head_weights
        for rows, width in arch.head_matrices:
            heads += block_bytes(block_type(grid.head, width), rows * width)
    return (
        arch.blocks * (linears + vectors)
        + heads
        + number * arch.other_outer_params
        + 4 * arch.final_norm_params
    )


def refusal(arch: Architecture, config: Mapping[str, Any], grid: GridConfig) -> str:
    """What of a model a GGUF file cannot hold, in words; empty where it holds all of it."""
    text = text_config(config)
    model_type = str(text.get("model_type") or arch.model_type)
    if model_type not in ARCHITECTURES:
        return f"a model of type {model_type!r} (it holds {', '.join(ARCHITECTURES)})"
    for linear in arch.linears:
        if linear.in_features % 32:
            return f"the {linear.in_features} inputs of {linear.name}, which 32 does not divide"
        if not block_type(grid.shared, linear.in_features):
            return f"{grid.bits} bits with zero points of their own; grid.zero_point = fixed makes it Q8_0"
    return next(_unknown_to(ARCHITECTURES[model_type], text), "")


def warnings(arch: Architecture, config: Mapping[str, Any], grid: GridConfig) -> Iterator[str]:
    """What becomes of a model in a GGUF file that somebody might not expect, in sentences."""
    kinds = {block_type(grid.shared, linear.in_features) for linear in arch.linears}
    if grid.bits == 2 and kinds == {"Q4_0"}:
        yield (
            "GGUF holds 2 bits with zero points of their own, or in groups of 32, as Q4_0: exact, at 4.5 "
            "bits a weight; fixed zero points (grid.zero_point) in groups that 64 divides make it Q2_0 (2.25)"
        )
    elif grid.bits == 2:
        yield "Q2_0 is new: a GGUF file of 2 bits loads in llama.cpp from mid-2026 on"
    elif grid.bits == 3:
        yield "GGUF has no type of 3 bits for free scales: Q4_0 holds them exactly, at 4.5 bits a weight"
    elif kinds == {"Q4_1"}:
        yield (
            "GGUF holds 4 bits with zero points of their own as Q4_1, whose biases are rounded to float16; "
            "grid.zero_point = fixed makes it Q4_0, which is exact and takes 4.5 bits a weight in place of 5"
        )
    if grid.head is not None and block_type(grid.head, arch.hidden) == "Q4_1" and "Q4_1" not in kinds:
        yield (
            "GGUF holds embedding and head of 4 bits with zero points of their own as Q4_1, whose biases "
            "are rounded to float16; grid.zero_point = fixed makes them Q4_0, which is exact"
        )
    text = text_config(config)
    window, positions = text.get("sliding_window"), text.get("max_position_embeddings") or 0
    if text.get("model_type") == "phi3" and window and window < positions:
        yield f"llama.cpp computes phi3 without its window of {window} tokens: longer texts differ there"


def full_rotary(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters of the layers that see the whole context, whichever version of transformers wrote the
    configuration."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if isinstance(rope.get("full_attention"), Mapping):
        rope = rope["full_attention"]
    found = {"rope_theta": text.get("rope_theta", 10000.0), **rope}
    found["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return found


def slides(architecture: str, index: int) -> bool:
    """Whether llama.cpp gives layer ``index`` of this architecture a window."""
    every = SLIDING_PATTERN[architecture]
    return index % every < every - 1


def attention_scale(architecture: str, layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """The size whose root divides a Gemma's attention scores, as llama.cpp computes it."""
    return hidden // heads if GEMMA_27B.get(architecture) == layers else head_dim


def _unknown_to(name: str, text: Mapping[str, Any]) -> Iterator[str]:
    """What a configuration asks for and the architecture ``name`` does not know, in words."""
    yield from _rotary(name, text)
    gemma = name in GEMMA_27B
    wanted = "gelu_pytorch_tanh" if gemma else "silu"
    activation = text.get("hidden_activation" if gemma else "hidden_act") or wanted
    if activation not in (wanted, "swish" if wanted == "silu" else wanted):
        yield f"the activation {str(activation)[:40]}"
    window, positions = text.get("sliding_window"), text.get("max_position_embeddings") or 0
    if text.get("model_type") == "mistral" and window and window < positions:
        yield f"attention within a window of {window} tokens of this architecture"
    if name in ("qwen2", "qwen3") and text.get("use_sliding_window"):
        yield f"attention within a window of {window} tokens of this architecture"
    if name == "qwen3" and text.get("attention_bias"):
        yield "biases of this architecture's attention"
    if gemma:
        yield from _gemma(name, text)


def _rotary(name: str, text: Mapping[str, Any]) -> Iterator[str]:
    rope = full_rotary(text)
    kind = str(rope["rope_type"])[:40]
    partial = rope.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        yield f"rotary positions of a part of each head ({partial})"
    if kind == "llama3" and name == "llama":
        if any(rope.get(key, value) != value for key, value in LLAMA3_SCALING.items()):
            yield "rotary scaling with other limits than those of Llama 3.1"
    elif kind not in ("default", "linear"):
        yield f"rotary scaling of type {kind!r}"


def _gemma(name: str, text: Mapping[str, Any]) -> Iterator[str]:
    layers, hidden, heads = (
        int(text.get(key) or 0) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    head_dim = int(text.get("head_dim") or 256)
    scale = text.get("query_pre_attn_scalar") or 256
    if heads and scale != attention_scale(name, layers, hidden, heads, head_dim):
        yield f"attention that is scaled by {scale}"
    kinds = text.get("layer_types") or []
    pattern = ["sliding_attention" if slides(name, i) else "full_attention" for i in range(len(kinds))]
    if list(kinds) != pattern:
        yield "another order of layers with and without a window than the family's"
    if text.get("use_bidirectional_attention"):
        yield "attention in both directions"
    if name == "gemma2":
        if not text.get("attn_logit_softcapping", 50.0):
            yield "a Gemma 2 whose attention scores are not capped"
        if text.get("tie_word_embeddings") is False:
            yield "a Gemma 2 whose head is not its embedding"
        return
    if text.get("attn_logit_softcapping"):
        yield "a Gemma 3 whose attention scores are capped"
    rope = text.get("rope_parameters")
    local = rope.get("sliding_attention") if isinstance(rope, Mapping) else None
    base = local.get("rope_theta") if isinstance(local, Mapping) else text.get("rope_local_base_freq")
    if base not in (None, GEMMA3_LOCAL_THETA):
        yield f"windowed layers whose rotary base is {base:g}"


def vector_type(dtype: str, dimensions: int) -> str:
    """GGUF's name of the type that a tensor which is not quantized is stored in."""
    assert dtype in DTYPE_BYTES
    return "F32" if dimensions < 2 else PLAIN_TYPES[dtype]
