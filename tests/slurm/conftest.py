"""A real Slurm for a test, and our program beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, Eqat, is_installed
from waiting import PATIENCE

REPOSITORY = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without Slurm there is nothing to try them on."""
    if not is_installed():
        here = str(Path(__file__).parent)
        for item in items:
            if str(item.path).startswith(here) and "cluster" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="needs Slurm: apt-get install slurm-wlm"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Slurm without a node that works: jobs wait, until a test starts one."""
    # Names of sockets are short, and so is this path.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        made = Cluster(Path(folder))
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture
def eqat(cluster: Cluster, tmp_path: Path) -> Eqat:
    """Run ``eqat ARGUMENTS`` in ``tmp_path``, where that cluster's commands are found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EQAT_")}
    nobodys = {name: os.environ[name] for name in ("EQAT_CONFIG_DIR", "EQAT_STATE_DIR")}
    environment = {**kept, **nobodys, **cluster.environment, "PYTHONPATH": str(REPOSITORY), "TERM": "dumb"}

    def call(*arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "eqat_tui", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )
        assert code is None or done.returncode == code, done.stderr
        return done

    return call
