"""Models of every architecture that GGUF files are written of, with the grids that matter."""

from __future__ import annotations

from typing import Any, NamedTuple

GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16, "tie_word_embeddings": True}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


class Case(NamedTuple):
    """A model, its grid, and the type that holds it."""

    model_type: str
    changes: dict[str, Any]
    bits: int
    group: int
    symmetric: bool
    kind: str
    transformers: bool = True
    """transformers reads it from the file as it is: it leaves out biases, head sizes and scales."""
    fixed: int | None = None
    """Every zero point of a grid that is not symmetric."""


CASES = [
    Case("llama", {}, 2, 64, False, "Q4_0"),
    Case("llama", {"tie_word_embeddings": True}, 2, 64, True, "Q2_0_g64", False),
    Case("llama", {"num_attention_heads": 8, "head_dim": 32}, 2, 128, True, "Q2_0_g64", False),
    Case("llama", {}, 2, 64, False, "Q2_0_g64", False, fixed=1),
    Case("qwen3", {"head_dim": 64}, 2, -1, False, "Q2_0_g64", False, fixed=1),
    Case("llama", {}, 2, 32, False, "Q4_0", fixed=1),
    Case("llama", {}, 2, 32, True, "Q4_0"),
    Case("llama", {"attention_bias": True, "mlp_bias": True}, 3, 32, False, "Q4_0", False),
    Case("llama", {"rope_parameters": LLAMA31, "tie_word_embeddings": True}, 3, -1, True, "Q4_0", False),
    Case("llama", {"rope_parameters": LINEAR}, 4, 64, False, "Q4_1", False),
    Case("mistral", {"sliding_window": None}, 8, 32, True, "Q8_0"),
    Case("qwen2", {}, 4, 128, False, "Q4_1"),
    Case("qwen2", {"tie_word_embeddings": True}, 2, 64, False, "Q4_0"),
    Case("qwen3", {"head_dim": 64, "tie_word_embeddings": True}, 4, 64, True, "Q4_0", False),
    Case("qwen3", {"head_dim": 128}, 4, 32, False, "Q4_1"),
    Case("gemma2", GEMMA, 4, -1, False, "Q4_1", False),
    Case("gemma3_text", {**GEMMA, "num_hidden_layers": 6}, 3, 64, False, "Q4_0", False),
    Case("phi3", {}, 4, 64, True, "Q4_0"),
]
NAMES = [f"{case.model_type}-w{case.bits}g{case.group}{'s' * case.symmetric}-{case.kind}" for case in CASES]
