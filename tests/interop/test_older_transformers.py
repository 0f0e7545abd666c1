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


UNSAID = "without the older names"
"""The StableLM without what an export says in the words of version 4: the comparison has to see that."""

pytestmark = pytest.mark.skipif(
    not OLDER.is_dir(), reason="run by `make interop`, which installs transformers 4.57"
)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Logits of every export, by the older transformers and by the one of this environment."""
    place = tmp_path_factory.mktemp("exports")
    (place / "ids.json").write_text(json.dumps(some_ids().tolist()))
    folders = {case: exported(place / str(number), case) for number, case in enumerate((*CASES, UNSAID))}
    found = {older: _read(place, older, list(folders.values())) for older in (True, False)}
    return {case: (found[True][folder.name], found[False][folder.name]) for case, folder in folders.items()}


def exported(folder: Path, case: str) -> Path:
    model_type, changes = CASES["stablelm" if case == UNSAID else case]
    original = save_model(folder.with_name(f"{folder.name}-fp"), model_type, **changes)
    if case == "cohere, nothing said":
        _drop(original, "rope_parameters")
    export(original, folder, 4, 64)
    if case == UNSAID:
        _drop(folder, "rope_theta", "partial_rotary_factor")
    return folder


def _drop(folder: Path, *names: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    left = {key: value for key, value in content.items() if key not in names}
    (folder / "config.json").write_text(json.dumps(left))


def _read(place: Path, older: bool, folders: list[Path]) -> dict[str, torch.Tensor]:
    before = [str(OLDER)] if older else []
    path = os.pathsep.join([*before, *filter(None, [os.environ.get("PYTHONPATH")])])
    out = place / ("older" if older else "newer")
    out.mkdir()
    command = [sys.executable, READER, place / "ids.json", out, *folders]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=1200)
    found = {folder.name: json.loads((out / f"{folder.name}.json").read_text()) for folder in folders}
    assert {each["version"].partition(".")[0] for each in found.values()} == {"4" if older else "5"}
    errors = {name: each["error"] for name, each in found.items() if "error" in each}
    assert not errors, "\n".join(errors.values())
    return {name: torch.tensor(each["logits"]) for name, each in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_version_4_computes_the_same_logits(
    read: dict[str, tuple[torch.Tensor, torch.Tensor]], case: str
) -> None:
    have, want = read[case]
    assert (have - want).abs().max() < 1e-5 * want.std()


def test_without_the_older_names_it_would_not(read: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    have, want = read[UNSAID]
    assert (have - want).abs().max() > 0.01 * want.std()
