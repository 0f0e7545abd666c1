"""A training inside a run is continued where it was interrupted, whatever it trains and whoever brought
it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_runs import of
from torch import Tensor, nn

from engine.checkpoints.commits import Checkpoints
from engine.checkpoints.snapshots import resumable
from engine.checkpoints.store import CheckpointStore
from engine.config.model import ModelConfig
from engine.config.run import RunConfig
from engine.config.runtime import RuntimeConfig
from engine.errors import ExitCode, StopRequested
from engine.reporter import Reporter
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.facts import TRAINING
from engine.training.loop import Method, Settings, Training
from engine.training.stepper import ParameterGroup

CPU = torch.device("cpu")
IDENTITY = {"what": "test"}
TOY = "toy"
SETTINGS = Settings(
    epochs=3,
    batch_size=2,
    micro_batch=2,
    weight_decay=0.01,
    grad_clip=0.0,
    lr_final_fraction=0.1,
    patience=0,
    seed=1,
    device=CPU,
    dtype=torch.float32,
    where=TOY,
    tokens_per_sequence=1,
)


class Toy(Method):
    """Looks for the mean of rows, which it sees through noise: the generator decides the result as well."""

    def __init__(self) -> None:
        self.value = nn.Parameter(torch.zeros(4))
        self.groups = [ParameterGroup("values", [self.value], 0.1)]
        self.rows = torch.arange(32.0).reshape(8, 4)

    def micro_step(self, rows: Tensor, weight: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
        loss = (self.value - self.rows[rows] + torch.rand(4)).square().mean() * weight
        scale(loss).backward()
        return loss.detach()

    def project(self) -> None: ...

    def validate(self, micro_batch: int) -> float | None:
        return None


@pytest.fixture
def report(tmp_path: Path) -> Iterator[Reporter]:
    run = RunDirectory.create(tmp_path, RunConfig(model=ModelConfig(source="random://tiny-llama")))
    reporter = Reporter(run, 1, CPU)
    reporter.begin([TOY], {TOY: 1.0})
    yield reporter
    reporter.close()


@pytest.fixture
def checkpoints(report: Reporter) -> Checkpoints:
    return Checkpoints(CheckpointStore(report.run.checkpoints_dir, IDENTITY), report, RuntimeConfig())


def trained(
    checkpoints: Checkpoints, stop_after: int | None = None, stage: str = TOY, *, abort: bool = False
) -> Tensor:
    """What a stage of somebody else's does; a stop is asked for after so many steps."""
    method, steps = Toy(), 0
    stop = StopRequested(abort=True, exit_code=ExitCode.ABORTED) if abort else StopRequested()

    def stop_asked() -> StopRequested | None:
        nonlocal steps
        steps += 1
        return stop if steps == stop_after else None

    checkpoints.report.stop_asked = stop_asked  # type: ignore[method-assign]
    torch.manual_seed(0)
    with resumable(checkpoints, stage) as keeper:
        Training(method, 8, SETTINGS, checkpoints.report, keeper.snapshot, keeper).run()
    return method.value.detach().clone()


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_an_interrupted_training_ends_with_the_same_bits(checkpoints: Checkpoints, stop_after: int) -> None:
    whole = trained(checkpoints)
    with pytest.raises(StopRequested):
        trained(checkpoints, stop_after)
    assert checkpoints.store.fact(TRAINING)["sampler"]["step"] == stop_after
    assert torch.equal(trained(checkpoints), whole)


def test_another_attempt_finds_the_snapshot_in_the_checkpoint(checkpoints: Checkpoints) -> None:
    whole = trained(checkpoints, stage="e2e_qp")
    with pytest.raises(StopRequested):
        trained(checkpoints, 6, "e2e_qp")
    store = CheckpointStore(checkpoints.store.directory, IDENTITY)
    again = Checkpoints(store, checkpoints.report, checkpoints.runtime)
    assert torch.equal(trained(again, stage="e2e_qp"), whole)


def test_what_is_trained_to_its_end_is_forgotten_by_the_next_commit(checkpoints: Checkpoints) -> None:
    with pytest.raises(StopRequested):
        trained(checkpoints, 3)
    trained(checkpoints)
    assert TRAINING not in checkpoints.store
    checkpoints.commit(TOY)
    assert CheckpointStore(checkpoints.store.directory, IDENTITY).fact(TRAINING) is None


@pytest.mark.parametrize(("stage", "block"), [("another", None), (TOY, 0)])
def test_a_snapshot_of_another_training_is_not_taken(
    checkpoints: Checkpoints, stage: str, block: int | None
) -> None:
    with pytest.raises(StopRequested):
        trained(checkpoints, 3)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with resumable(checkpoints, stage, block) as keeper:
        assert keeper.snapshot is None
        assert torch.equal(torch.get_rng_state(), before), "the random numbers are its own too"


def test_an_abort_keeps_nothing(checkpoints: Checkpoints) -> None:
    with pytest.raises(StopRequested):
        trained(checkpoints, 3, abort=True)
    assert checkpoints.store.fact(TRAINING) is None


def test_losses_go_to_the_reporter_and_snapshots_to_the_keeper(
    checkpoints: Checkpoints, report: Reporter
) -> None:
    told: list[int] = []
    report.due = lambda: True  # type: ignore[method-assign]
    report.metric = lambda *, step, **values: told.append(step)  # type: ignore[method-assign, assignment]
    with pytest.raises(StopRequested):
        trained(checkpoints, 4)
    report.events.close()
    assert told == [1, 2, 3, 4]
    (commit,) = of(report.run, events.CheckpointCommitted)
    assert (commit.phase, commit.block, commit.step) == (TOY, None, 4)
