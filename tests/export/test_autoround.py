"""Transformers loads our export through another library, auto-round's torch backend, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import open_model, packed_blocks, save_model, some_ids, trained_logits, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.export.layout import layout_of

pytest.importorskip("auto_round", reason="auto-round is not installed: pip install 'eqat[dev]'")

CASES: list[tuple[str, dict[str, Any], int, int, bool]] = [
    ("llama", {"tie_word_embeddings": True}, 2, 64, False),
    ("llama", {"tie_word_embeddings": False}, 3, 64, False),
    ("qwen2", {"tie_word_embeddings": True}, 3, 32, False),
    ("llama", {"tie_word_embeddings": True}, 4, 128, False),
    ("llama", {"tie_word_embeddings": True}, 2, 128, True),
    ("llama", {"tie_word_embeddings": True}, 8, 64, False),
]


@pytest.mark.parametrize(("model_type", "changes", "bits", "group", "symmetric"), CASES)
def test_transformers_with_auto_round_computes_the_trained_logits(
    tmp_path: Path, model_type: str, changes: dict[str, Any], bits: int, group: int, symmetric: bool
) -> None:
    directory = save_model(tmp_path / "fp", model_type, **changes)
    source, lm = open_model(directory)
    blocks = packed_blocks(lm, bits, group, symmetric)
    layout = layout_of("auto-round")
    result = write(tmp_path / "out", lm, source, blocks.__getitem__, layout=layout, shard_bytes=300_000)
    model = AutoModelForCausalLM.from_pretrained(result.path, device_map="cpu", dtype=torch.float16)
    classes = {type(module).__name__ for module in model.modules()}
    assert not any(isinstance(m, torch.nn.Linear) for m in model.model.layers.modules()), classes
    ids = some_ids()
    want = trained_logits(lm, blocks, ids)
    with torch.no_grad():
        have = model(ids).logits.float()
    # float16 arithmetic in their kernel: a few parts in a thousand of the logits' spread
    assert (have - want).abs().max() < 0.03 * want.std()
    assert (have.argmax(-1) == want.argmax(-1)).float().mean() >= 0.95
    assert AutoTokenizer.from_pretrained(result.path)("hello").input_ids
