"""Tiny models of families beyond those of ``tiny.py``: other names, other outer parts, other block lists.

Only what concerns how their weights are stored and counted is tested with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.models.tokenizer import byte_tokenizer

PLAIN = {key: size for key, size in tiny.SIZES.items() if key != "num_key_value_heads"}
"""Sizes without grouped queries."""
ROWS = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {**ROWS, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 256}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"model_type": "gpt_neox", **PLAIN},
    "gpt_neox_tied": {"model_type": "gpt_neox", **PLAIN, "tie_word_embeddings": True},
    "opt": {"model_type": "opt", **PLAIN, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "opt_projected": {
        "model_type": "opt",
        **PLAIN,
        "ffn_dim": 128,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "bloom": {"model_type": "bloom", **ROWS, "hidden_size": 64, "n_layer": 3, "n_head": 4},
    "falcon": {"model_type": "falcon", **PLAIN},
    "falcon_alibi": {
        "model_type": "falcon",
        **PLAIN,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "mpt": {"model_type": "mpt", **ROWS, "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
    "gptj": {"model_type": "gptj", **GPT, "rotary_dim": 8},
    "codegen": {"model_type": "codegen", **GPT, "rotary_dim": 8},
    "gpt_bigcode": {"model_type": "gpt_bigcode", **GPT, "n_inner": 128},
    "gpt_neo": {
        "model_type": "gpt_neo",
        **ROWS,
        "hidden_size": 64,
        "num_heads": 4,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 256,
    },
    "biogpt": {"model_type": "biogpt", **PLAIN},
    "xglm": {
        "model_type": "xglm",
        **ROWS,
        "d_model": 64,
        "ffn_dim": 128,
        "attention_heads": 4,
        "num_layers": 3,
        "max_position_embeddings": 256,
    },
    "phi": {"model_type": "phi", **PLAIN},
    "gemma": {"model_type": "gemma", **tiny.SIZES, "head_dim": 16},
    "stablelm": {"model_type": "stablelm", **tiny.SIZES, "use_qkv_bias": True},
    "starcoder2": {"model_type": "starcoder2", **tiny.SIZES},
    "cohere": {"model_type": "cohere", **tiny.SIZES},
    "olmo": {"model_type": "olmo", **tiny.SIZES},
    "persimmon": {"model_type": "persimmon", **PLAIN},
    "nemotron": {"model_type": "nemotron", **tiny.SIZES, "head_dim": 16},
    "glm4": {"model_type": "glm4", **tiny.SIZES, "head_dim": 16},
    "exaone4": {"model_type": "exaone4", **tiny.SIZES},
    "granite": {"model_type": "granite", **tiny.SIZES, "embedding_multiplier": 3.0},
    "hunyuan": {"model_type": "hunyuan_v1_dense", **tiny.SIZES, "head_dim": 16},
    "minicpm3": {"model_type": "minicpm3", **tiny.SIZES, **LATENT},
}


def model(name: str, seed: int = 0) -> PreTrainedModel:
    """The whole model in memory, every parameter random."""
    options = dict(FAMILIES[name])
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in whole.parameters():
                spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
                parameter.add_(torch.randn_like(parameter) * spread)
    return whole.eval()


def build(
    folder: Path, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **saving: Any
) -> Path:
    """Save one, and its tokenizer, in ``folder``."""
    model(name, seed).to(dtype).save_pretrained(folder, **saving)
    byte_tokenizer(ROWS["vocab_size"]).save_pretrained(folder)
    return folder
