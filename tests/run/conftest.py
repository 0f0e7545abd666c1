from __future__ import annotations

import json
from pathlib import Path

import pytest
from plan_tools import LLAMA_2_7B

from engine.config import loading as configs
from engine.run.directory import RunDirectory

CONFIG = configs.resolve(configs.load("smoke"))


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A directory named like Llama-2-7B's, with its config.json and nothing else."""
    directory = tmp_path / "Llama-2-7b-hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return str(directory)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def run(runs: Path) -> RunDirectory:
    """A run as it is before its first attempt."""
    return RunDirectory.create(runs, CONFIG)
