"""What an engine takes before it has read anything, by the build of torch that is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.plan.estimate import CONSTANTS, MIB
from engine.plan.memory_model import imported_bytes


@pytest.mark.parametrize(("library", "expected"), [("cpu", "base_cpu"), ("cuda", "base_cuda_build")])
def test_a_build_for_gpus_is_known_by_its_libraries(
    library: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "torch"
    (folder / "lib").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "lib" / f"libtorch_{library}.so").touch()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    imported_bytes.cache_clear()
    try:
        assert imported_bytes() == getattr(CONSTANTS, expected)
    finally:
        imported_bytes.cache_clear()


def test_it_is_what_importing_takes() -> None:
    code = "import torch, transformers, datasets, psutil; print(psutil.Process().memory_info().rss)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported_bytes() - 200 * MIB < int(done.stdout.split()[-1]) < imported_bytes() + 100 * MIB
