"""Four processes compute a run: whichever is killed, at whatever moment, it goes on to the same bytes; and it
goes on with another number of them only where that is asked for."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

import psutil
import pytest
from engine_runs import Child, exported, failure, make_run, of, output, snapshots_at_any_cost, start
from several import forked_ranks
from waiting import wait_until

from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]

FOUR = {
    "runtime.gpus": 4,
    "block_ap.batch_size": 4,
    "block_ap.sequences": 8,
    "block_ap.epochs": 5,
    "e2e_qp.batch_size": 4,
    "e2e_qp.sequences": 8,
    "e2e_qp.epochs": 5,
    "evaluation.windows": 4,
}
GONE_SECONDS = 60.0
"""In which all are gone once one is killed."""


def before() -> None:
    """In a run's engine: its state is kept whenever it can be."""
    forked_ranks()
    snapshots_at_any_cost()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    run = make_run(tmp_path_factory.mktemp("four"), FOUR)
    assert start(run, before=forked_ranks).code() == 0, output(run)
    return exported(run)


def progress(run: RunDirectory) -> int:
    """How far a run is: steps and checkpoints so far."""
    return len(of(run, events.Metric)) + len(of(run, events.CheckpointCommitted))


def test_whoever_is_killed_at_random_the_run_goes_on_to_the_same_bytes(
    make: Make, engine: Engine, uninterrupted: dict[str, str]
) -> None:
    chance, run = random.Random(19), make(**FOUR)
    for rank in chance.sample(range(4), 4):
        seen, child = progress(run), engine(run, before=before)
        enough = seen + chance.randint(2, 9)
        child.until(lambda enough=enough: progress(run) >= enough)
        first = psutil.Process(child.pid)
        others = first.children()
        (others[rank - 1] if rank else first).kill()
        wait_until(
            lambda child=child, others=others: (
                not child.alive() and not any(other.is_running() for other in others)
            ),
            GONE_SECONDS,
        )
        if rank:
            assert child.code() == 137, output(run)
            died = of(run, events.Error)[-1].message
            assert died == f"rank {rank} (process {others[rank - 1].pid}) was ended by SIGKILL"
            assert run_state(run) == "failed"
        else:
            assert child.code() == -signal.SIGKILL
            for other in (1, 2, 3):
                assert f"the first process ({child.pid}) is gone, and so is rank {other}" in output(run)
            assert run_state(run) == "crashed"
    assert engine(run, before=before).code() == 0, output(run)
    assert exported(run) == uninterrupted


def test_another_number_of_processes_is_refused_unless_it_is_allowed(make: Make, engine: Engine) -> None:
    """A snapshot holds the whole state, whatever number of ranks shared it out."""
    run = make(**FOUR)
    child = engine(run, before=before)
    child.until(lambda: any(event.step > 1 for event in of(run, events.Metric)))
    child.send(signal.SIGTERM)
    assert child.code() == 75, output(run)
    assert of(run, events.CheckpointCommitted)[-1].step, "in the middle of a training"
    two = ("--set", "runtime.gpus=2")
    assert engine(run, before=before, arguments=two).code() == 8, output(run)
    error = failure(run, 8)
    assert error.where == "runtime.gpus"
    assert "made on 4 GPUs, and on 2 the result would have other last bits" in error.message
    assert "--allow-world-size-change" in error.hint
    allowed = (*two, "--allow-world-size-change")
    assert engine(run, before=before, arguments=allowed).code() == 0, output(run)
    (warning,) = (event for event in of(run, events.Warning) if event.code == "changed")
    assert "is 2 and was 4: the result will have other last bits" in warning.message
    assert "begins anew" not in warning.message, "the batches are the same"
    assert exported(run)
