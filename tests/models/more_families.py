"""Families beyond those of ``tiny.py`` whose weights are stored and counted in other ways: other names, other
outer parts, other block lists. Their settings are those of ``variants.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import variants
from transformers import PreTrainedModel

LAYERS = 3
TWO_LAYERS = {"gpt_neo"}
"""Where the variant says how many."""

FAMILIES: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            *("gpt_neox", "opt", "opt_projected", "bloom", "falcon_multi_query", "falcon_alibi", "mpt"),
            *("gptj", "codegen", "gpt_bigcode", "gpt_neo", "biogpt", "xglm", "phi", "gemma", "stablelm"),
            *("starcoder2", "cohere", "olmo", "persimmon", "nemotron", "glm4", "exaone4", "granite"),
            *("hunyuan_v1_dense", "minicpm3"),
        )
    },
    "gpt_neox_tied": {"name": "gpt_neox", "tie_word_embeddings": True},
}
"""What tells each from the variant of its name, or of another."""


def model(name: str) -> PreTrainedModel:
    """The whole model in memory, every parameter random."""
    layers = variants.LAYERS if name in TWO_LAYERS else LAYERS
    return variants.model(**{"name": name, "layers": layers, **FAMILIES[name]})


def build(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """Save one, and its tokenizer, in ``folder``."""
    return variants.save(model(name).to(dtype), folder, **saving)
