from __future__ import annotations

import json
from pathlib import Path

import pytest
from plan_tools import LLAMA_2_7B


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A directory named like Llama-2-7B's, with its config.json and nothing else."""
    directory = tmp_path / "Llama-2-7b-hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return str(directory)
