"""Small runs through the whole engine; tests that start processes leave none behind."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_runs import Child, make_run, start

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
