"""gptqmodel, and transformers through it, load our gptq_v2 export and compute the trained logits.

Not in the normal suite: gptqmodel wants an environment of its own. ``make interop`` makes it with
install.sh and runs this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import export, save_model, some_ids, trained_logits

gptqmodel = pytest.importorskip("gptqmodel", reason="run by `make interop` in an environment of its own")

CASES: list[tuple[str, dict[str, Any], int, int, bool]] = [
    ("llama", {"tie_word_embeddings": True}, 2, 64, False),
    ("llama", {"tie_word_embeddings": False}, 3, 64, False),
    ("llama", {"tie_word_embeddings": True}, 3, 32, True),
    ("qwen2", {"tie_word_embeddings": True}, 2, 128, False),
    ("qwen2", {"tie_word_embeddings": False}, 4, 128, False),
    ("llama", {"tie_word_embeddings": True}, 8, 64, False),
    ("llama", {"tie_word_embeddings": True}, 4, -1, False),
]

params = pytest.mark.parametrize(("model_type", "changes", "bits", "group", "symmetric"), CASES)


def assert_same(have: torch.Tensor, want: torch.Tensor) -> None:
    """float16 arithmetic in their kernel: a few parts in a thousand of the logits' spread."""
    assert (have - want).abs().max() < 0.03 * want.std()
    assert (have.argmax(-1) == want.argmax(-1)).float().mean() >= 0.95


@params
def test_gptqmodel_computes_the_trained_logits(
    tmp_path: Path, model_type: str, changes: dict[str, Any], bits: int, group: int, symmetric: bool
) -> None:
    directory = save_model(tmp_path / "fp", model_type, **changes)
    lm, blocks, result = export(directory, tmp_path / "out", bits, group, symmetric, shard_bytes=300_000)
    model = gptqmodel.GPTQModel.load(
        str(result.path), device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float16
    )
    kernels = {type(m).__name__ for m in model.model.model.layers.modules() if hasattr(m, "qweight")}
    assert kernels == {"TorchLinear"}
    ids = some_ids()
    with torch.no_grad():
        have = model.model(ids).logits.float()
    assert_same(have, trained_logits(lm, blocks, ids))


@params
def test_transformers_with_gptqmodel_computes_the_trained_logits(
    tmp_path: Path, model_type: str, changes: dict[str, Any], bits: int, group: int, symmetric: bool
) -> None:
    from transformers import AutoModelForCausalLM, GPTQConfig

    directory = save_model(tmp_path / "fp", model_type, **changes)
    lm, blocks, result = export(directory, tmp_path / "out", bits, group, symmetric)
    model = AutoModelForCausalLM.from_pretrained(
        result.path,
        device_map="cpu",
        dtype=torch.float16,
        quantization_config=GPTQConfig(bits=bits, backend="torch"),
    )
    ids = some_ids()
    with torch.no_grad():
        have = model(ids).logits.float()
    assert_same(have, trained_logits(lm, blocks, ids))
