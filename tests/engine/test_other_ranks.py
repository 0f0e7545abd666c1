"""A run that goes on with another number of processes: with the same batches, and with that number from then
on."""

from __future__ import annotations

import signal
from collections.abc import Callable

from engine_runs import Child, exported, of, output, run_here, snapshots_at_any_cost
from several import forked_ranks

from engine.config.runtime import GPUS
from engine.run import events
from engine.run.continued import continued_on
from engine.run.directory import RunDirectory

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]

TWO = {
    GPUS: 2,
    "block_ap.batch_size": 4,
    "block_ap.sequences": 8,
    "block_ap.epochs": 5,
    "e2e_qp.enabled": False,
    "evaluation.enabled": False,
}


def before() -> None:
    """In a run's engine: its state is kept whenever it can be."""
    forked_ranks()
    snapshots_at_any_cost()


def stopped_in_a_training(run: RunDirectory, child: Child) -> None:
    """It stops where it has taken a few steps of its own."""
    seen = len(of(run, events.Metric))
    child.until(lambda: len(of(run, events.Metric)) > seen and of(run, events.Metric)[-1].step > 1)
    child.send(signal.SIGTERM)
    assert child.code() == 75, output(run)


def test_once_it_was_allowed_a_run_goes_on_with_the_other_number(make: Make, engine: Engine) -> None:
    run = make(**TWO)
    stopped_in_a_training(run, engine(run, before=before))
    assert continued_on(run) == {}, "as it was made"
    alone = ("--set", f"{GPUS}=1", "--allow-world-size-change")
    stopped_in_a_training(run, engine(run, before=before, arguments=alone))
    (warning,) = (event for event in of(run, events.Warning) if event.code == "changed")
    assert "is 1 and was 2: the result will have other last bits" in warning.message
    assert "begins anew" not in warning.message, "one process takes the batches that two take"
    assert continued_on(run) == {GPUS: 1}
    assert run_here(run) == 0, output(run)
    assert exported(run)
    assert [len(event.ranks) for event in of(run, events.PhaseFinished) if event.phase == "block_ap"] == [0]


def test_it_may_go_back_to_the_number_it_was_made_for(make: Make, engine: Engine) -> None:
    run = make(**TWO)
    stopped_in_a_training(run, engine(run, before=before))
    alone = ("--set", f"{GPUS}=1", "--allow-world-size-change")
    stopped_in_a_training(run, engine(run, before=before, arguments=alone))
    assert engine(run, before=before, arguments=("--allow-world-size-change",)).code() == 0, output(run)
    assert continued_on(run) == {GPUS: 2}
    assert exported(run)
