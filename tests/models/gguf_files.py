"""Tiny GGUF files as llama.cpp's converter would write them: its names, its row order, its metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
import torch
from tokenizers.pre_tokenizers import ByteLevel

from engine.models.gguf import llama3_divisors

NAMES = {"llama2": "llama", "llama3": "llama", "llama_biases": "llama"}
"""llama.cpp's name of an architecture where it differs from ours."""


def permute_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of a query or key projection's rows: halves of a head interleaved."""
    rest = weight.shape[1:]
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def write(
    file: Path,
    name: str,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rope_factor: float | None = None,
    extra: dict[str, Any] | None = None,
    merges: list[str] | None = None,
    **changes: Any,
) -> Path:
    """Write the tiny model ``name`` as a GGUF file whose matrices are stored as ``kind``; with ``merges`` it
    has a tokenizer of bytes and these pairs of them."""
    model = tiny.model(name, **changes)
    config, arch_name = model.config, NAMES.get(name, name)
    writer = gguf.GGUFWriter(file, arch_name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("rope_theta") or rope["full_attention"]["rope_theta"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    for key, value in (extra or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{arch_name}.{key}", value)
    if merges is not None:
        tokens = [*sorted(ByteLevel.alphabet()), *(pair.replace(" ", "") for pair in merges)]
        tokens += [f"<{index}>" for index in range(config.vocab_size)]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens[: config.vocab_size])
        writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
        writer.add_token_merges(merges)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch_name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for parameter_name, parameter in model.named_parameters():
        base, suffix = parameter_name.rsplit(".", 1)
        weight = parameter.detach()
        if arch_name == "llama" and "q_proj" in base:
            weight = permute_rotary(weight, config.num_attention_heads)
        elif arch_name == "llama" and "k_proj" in base:
            weight = permute_rotary(weight, config.num_key_value_heads)
        elif arch_name.startswith("gemma") and base.endswith("norm"):
            weight = weight + 1
        stored_as = kind if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        array = weight.contiguous().numpy().astype(np.float32)
        writer.add_tensor(
            f"{names.get_name(base)}.{suffix}", gguf.quantize(array, stored_as), raw_dtype=stored_as
        )
    if rope_factor is not None:
        steps = torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2)
        divisors = llama3_divisors(rope["rope_theta"] ** -steps, rope_factor)
        writer.add_tensor("rope_freqs.weight", divisors.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
