"""The models these tests export are those of the normal suite; what was loaded becomes a page."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
    from table import keep, page

    found: list[object] = []
    yield found
    if len(found) == len(test_formats.CASES) + len(gguf_models.CASES):
        keep(page(found))


@pytest.fixture(scope="session")
def compared() -> Iterator[list[Any]]:
    """The same of real models."""
    import test_real_models
    from table import keep, real_part

    found: list[Any] = []
    yield found
    if len(found) == len(test_real_models.CASES):
        keep(real_part(found))


@pytest.fixture(scope="session", autouse=True)
def real_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Any, Future[Any]]]:
    """The run of each grid that a chosen test of real models is about, in the folder EQAT_REAL_RUNS if it is
    named: begun with the first test of all, since a run takes minutes of a core. Two at a time, each on one
    core: so two are busy also while the tests wait for a run."""
    from real_models import INSTALLED, asked_run, formats_of, made

    grids = dict.fromkeys(
        item.callspec.params["case"].grid
        for item in request.session.items
        if item.path.name == "test_real_models.py" and INSTALLED
    )
    named = os.environ.get("EQAT_REAL_RUNS")
    with ThreadPoolExecutor(2) as pool:
        runs = {}
        for grid in grids:
            name = f"w{grid.bits}g{grid.group_size}"
            place = Path(named) / name if named else tmp_path_factory.mktemp(name)
            # Models are made here: where torch makes tensors is for all threads to obey.
            runs[grid] = pool.submit(made, asked_run(place, grid, formats_of(grid), threads=1))
        yield runs
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def served() -> Iterator[list[Any]]:
    """The same of vLLM."""
    import real_models
    import test_vllm
    from table import keep, served_part

    found: list[Any] = []
    yield found
    if len(found) == len(test_vllm.CASES):
        keep(served_part(found, test_vllm.WINDOWS * real_models.LENGTH))
