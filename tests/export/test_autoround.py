"""Transformers loads our export through another library, auto-round's torch backend, on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import export, save_model, some_ids, trained_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.export.gptq_v2 import auto_round_config

pytest.importorskip("auto_round", reason="auto-round is not installed: pip install 'eqat[dev]'")

CASES: list[tuple[str, dict[str, Any], int, int, bool]] = [
    ("llama", {"tie_word_embeddings": True}, 2, 64, False),
    ("llama", {"tie_word_embeddings": False}, 3, 64, False),
    ("qwen2", {"tie_word_embeddings": True}, 3, 32, False),
    ("llama", {"tie_word_embeddings": True}, 4, 128, False),
    ("llama", {"tie_word_embeddings": True}, 2, 128, True),
    ("llama", {"tie_word_embeddings": True}, 8, 64, False),
]


def for_auto_round(exported: Path, blocks_name: str, copy: Path) -> Path:
    """The same tensors under the configuration auto-round reads; nothing else changes."""
    shutil.copytree(exported, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = auto_round_config(config["quantization_config"], blocks_name)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "quantize_config.json").unlink()
    return copy


@pytest.mark.parametrize(("model_type", "changes", "bits", "group", "symmetric"), CASES)
def test_transformers_with_auto_round_computes_the_trained_logits(
    tmp_path: Path, model_type: str, changes: dict[str, Any], bits: int, group: int, symmetric: bool
) -> None:
    directory = save_model(tmp_path / "fp", model_type, **changes)
    lm, blocks, result = export(directory, tmp_path / "out", bits, group, symmetric, shard_bytes=300_000)
    copy = for_auto_round(result.path, result.blocks_name, tmp_path / "auto-round")
    model = AutoModelForCausalLM.from_pretrained(copy, device_map="cpu", dtype=torch.float16)
    classes = {type(module).__name__ for module in model.modules()}
    assert not any(isinstance(m, torch.nn.Linear) for m in model.model.layers.modules()), classes
    ids = some_ids()
    want = trained_logits(lm, blocks, ids)
    with torch.no_grad():
        have = model(ids).logits.float()
    # float16 arithmetic in their kernel: a few parts in a thousand of the logits' spread
    assert (have - want).abs().max() < 0.03 * want.std()
    assert (have.argmax(-1) == want.argmax(-1)).float().mean() >= 0.95
    assert AutoTokenizer.from_pretrained(copy)("hello").input_ids
