"""A run that several processes compute (here on the CPU): the same each time, and whatever happens to one of
them, it ends all of them and nothing that was kept is lost."""

from __future__ import annotations

import errno
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from engine_runs import Child, exported, failure, make_run, of, output, start
from several import forked_ranks
from waiting import wait_until

from engine.checkpoints import commits
from engine.checkpoints.store import CheckpointStore, Committed
from engine.errors import EqatError, ExitCode
from engine.ranks import others
from engine.run import control, events, launch
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.training.world import HEARING_SECONDS

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]

# Long enough to interfere.
TWO = {
    "runtime.gpus": 2,
    "block_ap.sequences": 8,
    "block_ap.epochs": 5,
    "e2e_qp.sequences": 8,
    "e2e_qp.epochs": 5,
    "evaluation.windows": 3,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What TWO exports when nobody interferes."""
    run = make_run(tmp_path_factory.mktemp("two"), TWO)
    assert start(run, before=forked_ranks).code() == 0, output(run)
    return exported(run)


def other_rank(child: Child) -> psutil.Process:
    """The second process of a run."""
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = psutil.Process(child.pid).children()
        return bool(found)

    child.until(there)
    return found[0]


def steps(run: RunDirectory, phase: str) -> int:
    return sum(e.phase == phase for e in of(run, events.Metric))


def test_it_goes_on_from_whatever_ends_it_to_the_same_export(
    make: Make, engine: Engine, uninterrupted: dict[str, str]
) -> None:
    run = make(**TWO)
    # Asked to stop by way of the second process: both end, with the state of the training kept.
    child = engine(run, before=forked_ranks)
    second = other_rank(child)
    child.until(lambda: steps(run, "block_ap") > 1)
    second.send_signal(signal.SIGTERM)
    assert child.code() == 75, output(run)
    wait_until(lambda: not second.is_running())
    assert run_state(run) == "stopped"
    assert any(event.step for event in of(run, events.CheckpointCommitted))

    # The second one is killed: the run says which, and ends.
    child = engine(run, before=forked_ranks)
    second = other_rank(child)
    seen = steps(run, "block_ap") + steps(run, "e2e_qp")
    child.until(lambda: steps(run, "block_ap") + steps(run, "e2e_qp") > seen + 2)
    second.kill()
    assert child.code() == 137, output(run)
    error = of(run, events.Error)[-1]
    assert f"rank 1 (process {second.pid}) was ended by SIGKILL" in error.message
    assert "Traceback" not in output(run)
    assert run_state(run) == "failed"

    # The first one is killed: the second one goes by itself.
    child = engine(run, before=forked_ranks)
    second = other_rank(child)
    child.until(lambda: steps(run, "e2e_qp"))
    child.send(signal.SIGKILL)
    wait_until(lambda: not second.is_running())
    assert run_state(run) == "crashed"
    assert f"the first process ({child.pid}) is gone, and so is rank 1" in output(run)

    assert engine(run, before=forked_ranks).code() == 0, output(run)
    assert exported(run) == uninterrupted


@pytest.mark.parametrize("asked", ["a warning to the second", "a warning to both", "a request"])
def test_however_a_stop_is_asked_for_both_stop_with_a_checkpoint(
    asked: str, make: Make, engine: Engine
) -> None:
    # Long enough that it is not over before anybody hears, on however busy a machine.
    run = make(**{**TWO, "block_ap.epochs": 400})
    child = engine(run, before=forked_ranks)
    second = other_rank(child)
    child.until(lambda: steps(run, "block_ap") > 1)
    if asked == "a request":
        control.request(run, "stop")
    else:
        second.send_signal(signal.SIGUSR1)
    if asked == "a warning to both":  # as Slurm warns all tasks of a step
        child.send(signal.SIGUSR1)
    assert child.code() == 75, output(run)
    wait_until(lambda: not second.is_running())
    assert run_state(run) == "stopped"
    assert [event.request for event in of(run, events.ControlAck)] == ["stop"] * (asked == "a request")
    assert of(run, events.CheckpointCommitted)[-1].step, "in the middle of a training"
    assert "Traceback" not in output(run)


def without_room(full: Path) -> None:
    """In this process, a run's engine: the other ranks are forked, and no checkpoint fits while there is a
    file ``full``."""
    forked_ranks()
    commit, usage = CheckpointStore.commit, shutil.disk_usage

    def fitting(store: CheckpointStore) -> Committed:
        if full.exists():
            raise EqatError("no room", exit_code=ExitCode.DISK_FULL) from OSError(errno.ENOSPC, "no room")
        return commit(store)

    CheckpointStore.commit = fitting  # type: ignore[method-assign]
    commits.shutil.disk_usage = lambda place: (  # type: ignore[attr-defined]
        SimpleNamespace(free=0) if full.exists() else usage(place)
    )
    commits.WAIT_SECONDS = 0.1


def test_all_wait_while_there_is_no_room_for_a_checkpoint(
    make: Make, engine: Engine, tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    run, full = make(**TWO), tmp_path / "full"
    before = partial(without_room, full)

    def fills_up() -> tuple[Child, psutil.Process]:
        """In the middle of a block; once the run says that it waits, both are there, and stand still."""
        seen, attempt = steps(run, "block_ap"), launch.next_attempt(run)
        child = engine(run, before=before)
        second = other_rank(child)
        child.until(lambda: steps(run, "block_ap") > seen)
        full.touch()
        child.until(lambda: of(run, events.Warning, attempt))
        (warning,) = of(run, events.Warning, attempt)
        assert warning.code == "disk_full"
        done = len(of(run, events.Metric))
        time.sleep(2 * HEARING_SECONDS)
        assert child.alive()
        assert second.status() != psutil.STATUS_ZOMBIE
        assert len(of(run, events.Metric)) == done
        return child, second

    # Asked to stop meanwhile, both do, and lose no more than what had no room.
    child, second = fills_up()
    control.request(run, "stop")
    assert child.code() == 75, output(run)
    wait_until(lambda: not second.is_running())
    assert run_state(run) == "stopped"
    full.unlink()

    # There is room again: both go on.
    child, second = fills_up()
    full.unlink()
    assert child.code() == 0, output(run)
    wait_until(lambda: not second.is_running())
    assert exported(run) == uninterrupted
    assert of(run, events.Error) == []


def test_what_each_process_held_is_in_the_run(make: Make, engine: Engine) -> None:
    run = make(**TWO)
    assert engine(run, before=forked_ranks).code() == 0, output(run)
    trained = next(e for e in of(run, events.PhaseFinished) if e.phase == "block_ap")
    assert [one.rank for one in trained.ranks] == [0, 1]
    each = [one.peak_host_bytes for one in trained.ranks if one.peak_host_bytes]
    assert len(each) == 2
    assert trained.peak_host_bytes == max(each)
    # What the first process makes alone is its own.
    assert next(e for e in of(run, events.PhaseFinished) if e.phase == "export").ranks == ()
    told = [event.ranks for event in of(run, events.Memory) if len(event.ranks) == 2]
    assert told, "a reading a second"
    assert [one.rank for one in told[-1]] == [0, 1]
    assert all(one.waited is not None for one in told[-1])
    assert len({one.host_used for one in told[-1]}) == 2, "each its own"


def with_another_device() -> None:
    """In this process: the other ranks are forked, and look for a GPU."""
    forked_ranks()
    fork = others.start_process

    def broken(arguments: Sequence[str], environment: dict[str, str], log: int) -> others.Process:
        return fork([*arguments, "--set", "runtime.device=cuda"], environment, log)

    others.start_process = broken


def with_a_full_disk() -> None:
    """In this process: the other ranks are forked, and have no room for a file of any size."""
    forked_ranks()
    fork = others.start_process

    def starved(arguments: Sequence[str], environment: dict[str, str], log: int) -> others.Process:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
        try:
            return fork(arguments, environment, log)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    others.start_process = starved


@pytest.mark.parametrize(
    ("before", "code", "where", "what"),
    [
        (with_another_device, 3, "rank 1, runtime.device", "no usable GPU"),
        (with_a_full_disk, 7, "rank 1, ", "no room for"),
    ],
)
def test_why_another_process_fails_is_said(
    before: Callable[[], None], code: int, where: str, what: str, make: Make, engine: Engine
) -> None:
    run = make(**TWO, **{"runtime.activation_store": "disk", "evaluation.enabled": False})
    assert engine(run, before=before).code() == code, output(run)
    error = failure(run, code)
    assert error.where.startswith(where)
    assert what in error.message


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("deterministic", [True, False])
def test_two_gpus_do_what_two_processes_do(make: Make, engine: Engine, deterministic: bool) -> None:
    """With torch's kernels, the same bytes twice; with ours, recorded steps and NCCL, a loss as good."""
    settings = {**TWO, "runtime.device": "cuda", "runtime.deterministic": deterministic}
    runs = [make(**settings) for _ in range(2)]
    for run in runs:
        assert engine(run, module=True).code() == 0, output(run)
        assert [event.message for event in of(run, events.Warning)] == []
    if deterministic:
        assert exported(runs[0]) == exported(runs[1])
    on_cpu = make(**TWO)
    assert engine(on_cpu, module=True).code() == 0, output(on_cpu)
    found, expected = (
        [e.val_loss for e in of(run, events.BlockFinished) if e.val_loss is not None]
        for run in (runs[0], on_cpu)
    )
    # Our kernels round to bfloat16 on the way, and came 7 % apart; test_gpu.py allows one GPU as much.
    assert found == pytest.approx(expected, rel=0.05 if deterministic else 0.15)
