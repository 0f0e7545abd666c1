"""Small runs through the whole engine; tests that start processes leave none behind."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_runs import Child, make_run, output, start

from engine.run.directory import RunDirectory

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(autouse=True)
def _own_token_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are cached outside of runs; tests keep them out of the user's cache and share them."""
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "eqat-cache"))


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """An engine that runs inside the test process sets signal handlers and threads for good."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    threads = torch.get_num_threads()
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    torch.set_num_threads(threads)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., RunDirectory]:
    """``make(**{"grid.bits": 3})``: the directory of a small run."""
    return lambda **overrides: make_run(tmp_path / "runs", overrides)


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunDirectory]:
    """``finished_once(**{"grid.bits": 3})``: a small run that nobody interfered with, only to be read.

    Each is made once, by the first process that asks for it, and not in every file and every process that
    shares the tests: it comes out the same each time (test_pipeline.py says so).
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def finished(**overrides: object) -> RunDirectory:
        name = hashlib.sha256(repr(sorted(overrides.items())).encode()).hexdigest()[:16]
        place, made = shared / f"finished-{name}", shared / f"finished-{name}.partial"
        with (shared / f"finished-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                shutil.rmtree(made, ignore_errors=True)
                run = make_run(made, overrides)
                assert start(run).code() == 0, output(run)
                made.rename(place)
        (path,) = (path for path in place.iterdir() if path.is_dir())
        return RunDirectory.open(path)

    return finished


@pytest.fixture
def finished_copy(finished_once: Callable[..., RunDirectory], tmp_path: Path) -> Callable[..., RunDirectory]:
    """The same, to go on with."""

    def copied(**overrides: object) -> RunDirectory:
        original = finished_once(**overrides)
        return RunDirectory.open(shutil.copytree(original.path, tmp_path / "copies" / original.id))

    return copied


@pytest.fixture
def engine() -> Iterator[Callable[..., Child]]:
    """Starts an engine process on a run; what still runs afterwards is killed."""
    children: list[Child] = []

    def begin(run: RunDirectory, **options: object) -> Child:
        children.append(start(run, **options))  # type: ignore[arg-type]
        return children[-1]

    yield begin
    for child in children:
        child.end()


@pytest.fixture
def stories() -> Path:
    """A real model of 260 thousand parameters."""
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the shared models are not here")
    return folder
