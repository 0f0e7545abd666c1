"""Tiny random models of every supported architecture, saved as a user would find them on disk.

``build(folder, "qwen3")`` writes config.json, safetensors and a byte-level tokenizer. Sizes are chosen so
that every group size up to 64 divides, sliding windows (8) are shorter than test sequences, and layers
differ where the architecture lets them. All parameters are random, norms and biases included: a weight
that is forgotten or put in the wrong place shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from engine.models.tokenizer import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 8

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama1": {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "llama2": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"model_type": "phi3", "sliding_window": WINDOW},
    "olmo2": {"model_type": "olmo2"},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
}
"""What tells each tiny model from the sizes above."""


def config(name: str, **changes: Any) -> PreTrainedConfig:
    """Configuration of one tiny model."""
    options = {**SIZES, **ARCHITECTURES[name], **changes}
    return AutoConfig.for_model(options.pop("model_type"), **options)


def model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The whole tiny model in memory, every parameter random."""
    return with_soft_cap(random_model(config(name, **changes), seed))


def random_model(of: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of that configuration, every parameter random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        result = AutoModelForCausalLM.from_config(of, dtype=torch.float32)
        with torch.no_grad():
            for parameter in result.parameters():
                spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
                parameter.add_(torch.randn_like(parameter) * spread)
    whole: PreTrainedModel = result.eval()
    return whole


def with_soft_cap(whole: PreTrainedModel) -> PreTrainedModel:
    """The model with attention that honours its soft cap; older releases of transformers pick another."""
    if getattr(whole.config, "attn_logit_softcapping", None) is not None:
        whole.set_attn_implementation("eager")
    return whole


def build(
    folder: Path,
    name: str = "llama2",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    **changes: Any,
) -> Path:
    """Save a tiny model and its tokenizer in ``folder``; ``shard_size`` such as ``"100KB"`` splits it."""
    model(name, seed, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    byte_tokenizer(SIZES["vocab_size"]).save_pretrained(folder)
    return folder


def tokens(batch: int = 2, length: int = 21, seed: int = 0) -> torch.Tensor:
    """Random token ids that avoid the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=generator)
