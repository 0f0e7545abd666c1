"""transformers 4.57 reads our exports as the installed version 5 does: the same logits of the same file.

The release is installed into a folder of its own by install.sh, beside the environment, and put in front of
it in a process that this starts; another place is named by EQAT_OLDER_TRANSFORMERS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import export, save_model, some_ids

OLDER = Path(os.environ.get("EQAT_OLDER_TRANSFORMERS", Path(sys.prefix) / "transformers-4"))
READER = Path(__file__).with_name("plain_logits.py")

LAYERS = ["sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "yarn, context unsaid": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 64,
            "layer_types": LAYERS,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 2e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
            },
        },
    ),
    "olmo3": ("olmo3", {"layer_types": LAYERS, "sliding_window": 8}),
    "stablelm": (
        "stablelm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi": (
        "phi",
        {
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0 + i / 32 for i in range(32)],
                "long_factor": [4.0 + i / 32 for i in range(32)],
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5},
        },
    ),
    "glm": (
        "glm",
        {
            "head_dim": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
        },
    ),
    "nemotron": (
        "nemotron",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.25}},
    ),
    "persimmon": (
        "persimmon",
        {
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
        },
    ),
    "cohere, nothing said": ("cohere", {}),
}


def read(folder: Path, place: Path, older: bool) -> dict[str, Any]:
    """What the reader says of the export, by the older transformers or by the one of this environment."""
    before = [str(OLDER)] if older else []
    path = os.pathsep.join([*before, *filter(None, [os.environ.get("PYTHONPATH")])])
    ids, out = place / "ids.json", place / f"logits-{older}.json"
    ids.write_text(json.dumps(some_ids().tolist()))
    command = [sys.executable, str(READER), str(folder), str(ids), str(out)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.skipif(not OLDER.is_dir(), reason="run by `make interop`, which installs transformers 4.57")
@pytest.mark.parametrize("case", CASES)
def test_version_4_computes_the_same_logits(tmp_path: Path, case: str) -> None:
    model_type, changes = CASES[case]
    directory = save_model(tmp_path / "fp", model_type, **changes)
    if case == "cohere, nothing said":
        content = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(
            json.dumps({key: value for key, value in content.items() if key != "rope_parameters"})
        )
    _, _, result = export(directory, tmp_path / "out", 4, 64)
    new, old = (read(result.path, tmp_path, older) for older in (False, True))
    assert new["version"].startswith("5.")
    assert old["version"].startswith("4.57")
    have, want = torch.tensor(old["logits"]), torch.tensor(new["logits"])
    assert (have - want).abs().max() < 1e-5 * want.std()


@pytest.mark.skipif(not OLDER.is_dir(), reason="run by `make interop`, which installs transformers 4.57")
def test_without_the_older_names_it_would_not(tmp_path: Path) -> None:
    """That the comparison sees what it is for."""
    model_type, changes = CASES["stablelm"]
    _, _, result = export(save_model(tmp_path / "fp", model_type, **changes), tmp_path / "out", 4, 64)
    content = json.loads((result.path / "config.json").read_text())
    for name in ("rope_theta", "partial_rotary_factor"):
        del content[name]
    (result.path / "config.json").write_text(json.dumps(content))
    new, old = (torch.tensor(read(result.path, tmp_path, older)["logits"]) for older in (False, True))
    assert (new - old).abs().max() > 0.01 * new.std()
