"""The models these tests export are those of the normal suite; what was loaded becomes a page."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# On matrices this small, compiling kernels and a second thread cost more than they compute.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))


@pytest.fixture(scope="session")
def tried() -> Iterator[list[object]]:
    """What was loaded; once every cell of every format was, it becomes the page."""
    import gguf_models
    import test_formats
    from table import PAGE, page

    found: list[object] = []
    yield found
    if len(found) == len(test_formats.CASES) + len(gguf_models.CASES):
        PAGE.write_text(page(found))
