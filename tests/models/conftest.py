"""A model as it came, for the files that change its configuration."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, only to be read."""
    return tiny.build(tmp_path_factory.mktemp("pristine") / "model", "llama2")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it, for one test."""
    return shutil.copytree(pristine, tmp_path / "model")
