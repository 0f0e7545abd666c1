"""Settings that make a tiny random model of each variant in the table of families (``docs/families.md``).

On top of :data:`tiny.SIZES`, as far as the variant's configuration class has such a setting under that or
another name, a row says only what the family needs besides. ``config("gpt_neo")`` and so on may raise
:class:`Unknown`: this transformers has no such family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from engine.models.tokenizer import byte_tokenizer

LAYERS = 2
MIXED = ["sliding_attention", "full_attention"]
RECURRENT = ["linear_attention", "full_attention"]
HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": tiny.WINDOW}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
          "v_head_dim": 16, "num_key_value_heads": 4}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 32}
GATED_DELTA = {**HEAD, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
               "linear_value_head_dim": 16, "layer_types": RECURRENT}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    # Llama's kind
    "llama": {},
    "llama_yarn": {
        "model_type": "llama",
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama_experts_field": {"model_type": "llama", "num_experts_per_tok": 2, "num_local_experts": 4},
    "mistral": WINDOW,
    "ministral": HEAD,
    "ministral3": HEAD,
    "qwen2": {},
    "qwen2_sliding": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    "qwen3": {"head_dim": 32},
    "gemma": HEAD,
    "gemma2": {**HEAD, **WINDOW, "query_pre_attn_scalar": 24},
    "gemma3_text": {**HEAD, **WINDOW, "layer_types": MIXED},
    "gemma4_text": {
        **HEAD,
        **WINDOW,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "layer_types": MIXED,
    },
    "vaultgemma": HEAD,
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "phi3_longrope": {
        "model_type": "phi3",
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 16,
        },
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
    },
    "granite_swa": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **WINDOW},
    "starcoder2": WINDOW,
    "stablelm": {"use_qkv_bias": True},
    "persimmon": {},
    "nemotron": HEAD,
    "glm": HEAD,
    "glm4": HEAD,
    "exaone4": WINDOW,
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "ernie4_5": HEAD,
    "seed_oss": HEAD,
    "arcee": {},
    "apertus": {},
    "bitnet": {},
    "doge": {"is_moe": False, "num_attention_heads": 8, "num_key_value_heads": 8},
    "diffllama": {},
    "cwm": HEAD,
    "nanochat": {},
    "youtu": LATENT,
    "minicpm3": LATENT,
    "jais2": {},
    "moshi": {},
    "blt": {},
    "hyperclovax": {},
    "deepseek_v3_dense": {
        **LATENT,
        **EXPERTS,
        "model_type": "deepseek_v3",
        "first_k_dense_replace": LAYERS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen3_moe_dense": {
        **HEAD,
        **EXPERTS,
        "model_type": "qwen3_moe",
        "num_experts": 2,
        "mlp_only_layers": list(range(LAYERS)),
    },
    "glm4_moe_dense": {
        **HEAD,
        **EXPERTS,
        "model_type": "glm4_moe",
        "n_routed_experts": 4,
        "first_k_dense_replace": LAYERS,
    },
    "granitemoehybrid_dense": {
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 128,
        "layer_types": ["attention"] * LAYERS,
    },
    "qwen3_next_attention": {
        **GATED_DELTA,
        "model_type": "qwen3_next",
        "num_experts": 0,
        "layer_types": ["full_attention"] * LAYERS,
    },
    "cohere_head_norms": {"model_type": "cohere", "logit_scale": 0.25, "use_qk_norm": True},
    "stablelm_head_norms": {"model_type": "stablelm", "qk_layernorm": True},
    "internlm3": {},
    # older kinds, many with a table of positions
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "opt_projected": {
        "model_type": "opt",
        "ffn_dim": 128,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "falcon_multi_query": {
        "model_type": "falcon",
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "bias": False,
    },
    "falcon_new": {"model_type": "falcon", "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon_alibi": {
        "model_type": "falcon",
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "bloom": {},
    "mpt": {"max_seq_len": 256},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_bigcode": {"n_inner": 128},
    "gpt2": {},
    "ctrl": {"dff": 128},
    "xglm": {"ffn_dim": 128},
    "biogpt": {},
    # mixtures of experts
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "mixtral_one_expert": {"model_type": "mixtral", "num_local_experts": 1, "num_experts_per_tok": 1},
    "qwen3_moe": {**HEAD, **EXPERTS, "num_experts": 2},
    "gpt_oss": {**HEAD, "num_local_experts": 2, "num_experts_per_tok": 1},
    "jetmoe": {"num_local_experts": 2, "num_experts_per_tok": 1, "kv_channels": 16, "num_key_value_heads": 2},
    "afmoe": {},
    # state spaces, convolutions, recurrences
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "attn_layer_indices": [1]},
    "recurrent_gemma": {
        "lru_width": 64,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
    },
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "rwkv": {"attention_hidden_size": 64},
    "zamba2": {
        "mamba_d_state": 16,
        "mamba_headdim": 16,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"],
        "attention_head_dim": 32,
        "adapter_rank": 8,
    },
    "qwen3_next": {**GATED_DELTA, "num_experts": 0},
    "qwen3_5_text": GATED_DELTA,
    "gemma3n_text": {
        **HEAD,
        **WINDOW,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "layer_types": MIXED,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
}


UNBUILT = {"blt"}
"""Models that are large in any case; their configuration alone shows what becomes of them."""


class Unknown(Exception):
    """This transformers has no such family, or a configuration class of it that cannot be made from these."""


def settings(name: str, layers: int = LAYERS) -> dict[str, Any]:
    """A variant's fields, those that every tiny model shares under the names that its class gives them."""
    own = {"model_type": name, **VARIANTS[name]}
    if own["model_type"] not in CONFIG_MAPPING:
        raise Unknown(own["model_type"])
    kind = CONFIG_MAPPING[own["model_type"]]
    names, fields = kind.attribute_map, vars(kind())
    common: dict[str, Any] = {}
    for key, value in (tiny.SIZES | {"num_hidden_layers": layers}).items():
        if (field := names.get(key, key)) in fields:
            common[field] = value
    return common | own


def config(name: str, layers: int = LAYERS, **changes: Any) -> PreTrainedConfig:
    options = settings(name, layers) | changes
    return CONFIG_MAPPING[options.pop("model_type")](**options)


def model(name: str, layers: int = LAYERS, **changes: Any) -> PreTrainedModel:
    """The whole variant in memory, every parameter random."""
    whole = tiny.random_model(config(name, layers, **changes))
    with torch.no_grad():
        for module in whole.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as some classes have it when they load a model
    return whole


def build(folder: Path, name: str, **changes: Any) -> Path:
    """Save a variant and its tokenizer."""
    if name in UNBUILT:
        config(name, **changes).save_pretrained(folder)
        return folder
    return save(model(name, **changes), folder)


def save(whole: PreTrainedModel, folder: Path, **saving: Any) -> Path:
    """Save a model and the tokenizer that is every variant's."""
    whole.save_pretrained(folder, **saving)
    byte_tokenizer(tiny.SIZES["vocab_size"]).save_pretrained(folder)
    return folder
