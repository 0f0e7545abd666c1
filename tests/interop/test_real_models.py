"""Runs of a real model, in every format that fits, predict in each format's loader what was trained.

SmolLM2-135M at 2 and 3 bits in groups of 64, and at 4 bits in groups of 128 in a shape that those divide;
over two thousand tokens of English. The runs are trained for a moment each. llama.cpp rounds activations to
8 bits, so of its files perplexity has to agree within 1 %; of all others the likeliest token of 99 in 100.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from loaders import LOADERS
from real_models import (
    INSTALLED,
    Trained,
    cores,
    formats_of,
    llama_predictions,
    predictions,
    read_trained,
)
from table import Compared

from engine.config.grid import Grid
from engine.run import event_log, events
from engine.run.directory import RunDirectory

pytest.importorskip("gptqmodel", reason="run by `make interop` in an environment of its own")
pytestmark = pytest.mark.skipif(not INSTALLED, reason="the demo's model is not installed")

GRIDS = [Grid(4, 128), Grid(2, 64), Grid(3, 64)]


class Case(NamedTuple):
    grid: Grid
    format: str

    def __str__(self) -> str:
        return f"w{self.grid.bits}g{self.grid.group_size}-{self.format}"


CASES = [Case(grid, name) for grid in GRIDS for name in formats_of(grid)]


@pytest.fixture(scope="module")
def trained(real_runs: dict[Grid, Future[RunDirectory]]) -> Iterator[Callable[[Grid], Trained]]:
    """What the run of a grid trained, once it is there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(cores())

    @functools.cache
    def of(grid: Grid) -> Trained:
        return read_trained(real_runs[grid].result())

    yield of
    torch.set_num_threads(threads)


@pytest.mark.timeout(1800)  # the first of a grid waits for its run, on a machine that may be busy
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loader_predicts_what_the_run_trained(
    case: Case, trained: Callable[[Grid], Trained], compared: list[Compared]
) -> None:
    model = trained(case.grid)
    folder = model.run.export_dir / case.format
    assert told_verified(model, case.format)
    name = case.format
    if name == "gguf":
        agree, ratio, words, kind = in_llama_cpp(folder, model)
        name = f"gguf {kind}"
        tokens = model.ids_NT.numel()
    else:
        loader = LOADERS[case.format]
        options = {"dtype": torch.float32} if loader.sets_dtype else {}
        ids_NT = model.ids_NT[: loader.windows]
        logits, _ = loader.load(folder, ids_NT, **options)
        agree, ratio = model.compared(predictions(logits, ids_NT))
        tokens = ids_NT.numel()
        words = loader.words
    print(
        f"{case}: {100 * agree:.2f} % of the likeliest tokens, perplexity {ratio:.5f} of the trained model's"
    )
    assert agree >= 0.99 or case.format == "gguf"
    assert ratio == pytest.approx(1, abs=0.01)
    compared.append(Compared(name, case.grid.bits, case.grid.group_size, words, tokens, agree, ratio))


def in_llama_cpp(folder: Path, model: Trained) -> tuple[float, float, str, str]:
    """What :class:`Compared` has of the only file in there: agreement, perplexity, loader, and its type."""
    llama_cpp = pytest.importorskip("llama_cpp")
    (file,) = folder.glob("*.gguf")
    agree, ratio = model.compared(llama_predictions(file, model.ids_NT))
    kind = file.stem.rpartition("-")[2]
    return agree, ratio, f"llama-cpp-python {llama_cpp.__version__}", kind


def told_verified(model: Trained, name: str) -> bool:
    """What the run says of its export."""
    told = [
        event
        for event in event_log.read_events(model.run.events_path)[0]
        if isinstance(event, events.Export) and event.format == name
    ]
    return bool(told) and told[-1].verified
