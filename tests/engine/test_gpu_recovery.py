"""On a GPU: killed and resumed with deterministic kernels, the export is the same; too little memory is
survived."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_runs import Child, exported, failure, make_run, of, output, snapshots_at_any_cost, start

from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]

SLOW = {
    "runtime.device": "cuda",
    "runtime.deterministic": True,
    "runtime.checkpoint_minutes": 1e-4,
    "runtime.checkpoint_share": 1.0,
    "block_ap.sequences": 16,
    "block_ap.epochs": 8,
    "block_ap.start": "search",
    "block_ap.drop_largest": 0.01,
    "e2e_qp.sequences": 16,
    "e2e_qp.epochs": 8,
}


def kept_inside(run: RunDirectory, phase: str) -> list[events.CheckpointCommitted]:
    """Checkpoints that were taken in the middle of a training."""
    return [e for e in of(run, events.CheckpointCommitted) if e.phase == phase and e.step]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    run = make_run(tmp_path_factory.mktemp("runs"), SLOW)
    assert start(run).code() == 0, output(run)
    return exported(run)


@pytest.mark.parametrize("phase", ["block_ap", "e2e_qp"])
@pytest.mark.parametrize("streams", ["stored", "recomputed"])
def test_resume_is_bitwise_identical_on_the_gpu_with_deterministic_kernels(
    make: Make, engine: Engine, whole: dict[str, str], phase: str, streams: str
) -> None:
    run = make(**{**SLOW, "runtime.streams": streams})
    child = engine(run, before=snapshots_at_any_cost)
    child.until(lambda: len(kept_inside(run, phase)) > 2)
    child.send(signal.SIGKILL)
    child.code()
    assert run_state(run) == "crashed"
    assert engine(run).code() == 0, output(run)
    first = next(e for e in of(run, events.Metric, attempt=2) if e.phase == phase)
    assert first.step > 1, "it went on inside"
    assert exported(run) == whole


# -- too little memory ---------------------------------------------------------------------------------

# Batches whose activations are most of what the training of a block needs.
LARGE = {
    "runtime.device": "cuda",
    "runtime.activation_store": "host",
    "evaluation.enabled": False,
    "e2e_qp.enabled": False,
    "block_ap.sequences": 32,
    "block_ap.val_sequences": 0,
    "block_ap.batch_size": 32,
    "block_ap.sequence_length": 2048,
}
LONG = {**LARGE, "block_ap.sequences": 4, "block_ap.batch_size": 1, "block_ap.sequence_length": 16384}


def with_room(folder: Path, settings: dict[str, object]) -> RunDirectory:
    """A run with all the memory it wants."""
    run = make_run(folder, settings)
    assert start(run).code() == 0, output(run)
    return run


def peak(run: RunDirectory) -> int:
    (phase,) = [e for e in of(run, events.PhaseFinished) if e.phase == "block_ap"]
    assert phase.peak_gpu_bytes is not None
    return phase.peak_gpu_bytes


def test_out_of_gpu_memory_halves_the_micro_batch_and_the_run_goes_on(
    make: Make, engine: Engine, tmp_path: Path
) -> None:
    roomy = with_room(tmp_path, LARGE)
    run = make(**LARGE)
    code = engine(run, gpu_bytes=int(0.6 * peak(roomy))).code()
    assert code == 0, (of(run, events.Error), of(run, events.Warning), peak(roomy))
    halvings = [e for e in of(run, events.Warning) if e.code == "micro_batch"]
    assert halvings
    assert "block 0" in halvings[0].message
    assert "32 sequences at a time; going on with 16" in halvings[0].message
    assert of(run, events.Export)[0].verified
    there = {e.block: e.final_loss for e in of(roomy, events.BlockFinished)}
    for block in of(run, events.BlockFinished):
        assert block.final_loss == pytest.approx(there[block.block], rel=0.05), "the effective batch is kept"


def test_when_nothing_is_left_to_halve_it_ends_with_6_and_says_what_was_needed(
    make: Make, engine: Engine, tmp_path: Path
) -> None:
    roomy = with_room(tmp_path, LONG)
    run = make(**LONG)
    code = engine(run, gpu_bytes=int(0.6 * peak(roomy))).code()
    assert code == 6, (of(run, events.Error), peak(roomy))
    error = failure(run, 6)
    assert error.where.startswith("block_ap, block 0")
    assert "more were needed" in error.message
    assert "were free" in error.message
    assert "resume" in error.hint
    assert "Traceback" not in output(run)
