"""Stopped, killed, started again: nothing finished is done twice, and the result is the same to the bit."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_runs import Child, change, exported, failure, of, output, run_here
from waiting import holds_back, waits

from engine.plan.network_training import NetworkTraining
from engine.run import control, events
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.run.state import load_state

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]

# Slow enough that a block takes a third of a second and end-to-end training two: time to interfere.
SLOW = {"block_ap.sequences": 16, "block_ap.epochs": 8, "e2e_qp.sequences": 12, "e2e_qp.epochs": 5}


@pytest.fixture
def uninterrupted(finished_once: Callable[..., RunDirectory]) -> dict[str, str]:
    """What SLOW exports when nobody interferes."""
    return exported(finished_once(**SLOW))


def finished_blocks(run: RunDirectory) -> list[int]:
    return [e.block for e in of(run, events.BlockFinished)]


def training(run: RunDirectory, phase: str) -> bool:
    return any(e.phase == phase for e in of(run, events.Metric))


# -- killed --------------------------------------------------------------------------------------------


def killed_between_blocks(make: Make, engine: Engine) -> tuple[RunDirectory, list[int]]:
    """A run that was killed with two of its four blocks finished, and these blocks.

    On a busy machine the kill may come too late to say anything: then there is another try.
    """
    for _ in range(5):
        run = make(**SLOW)
        child = engine(run, module=True)
        child.until(lambda run=run: 1 in finished_blocks(run))
        child.send(signal.SIGKILL)
        if child.code() == -signal.SIGKILL and 2 not in finished_blocks(run):
            return run, finished_blocks(run)
    raise AssertionError("it was killed too late to test anything, five times")


def test_a_killed_run_continues_and_its_export_is_identical_to_the_bit(
    make: Make, engine: Engine, uninterrupted: dict[str, str]
) -> None:
    run, done = killed_between_blocks(make, engine)
    assert run_state(run) == "crashed"

    assert run_here(run) == 0
    assert exported(run) == uninterrupted
    again = of(run, events.BlockFinished, attempt=2)
    assert [e.block for e in again] == [0, 1, 2, 3]
    assert [e.block for e in again if e.restored][: len(done)] == done
    assert not again[3].restored
    losses = {e.block: e.final_loss for e in of(run, events.BlockFinished, attempt=1)}
    assert all(e.final_loss == losses[e.block] for e in again if e.block in losses)
    trained = {e.block for e in of(run, events.Metric, attempt=2) if e.phase == "block_ap"}
    assert trained.isdisjoint(done), "a finished block was trained again"
    assert load_state(run).outcome == "done"


def test_killed_in_the_middle_of_end_to_end_training_it_trains_no_block_again(
    make: Make, engine: Engine, uninterrupted: dict[str, str]
) -> None:
    run = make(**SLOW)
    child = engine(run)
    child.until(lambda: training(run, "e2e_qp"))
    child.send(signal.SIGKILL)
    child.code()
    assert run_state(run) == "crashed"
    assert run_here(run) == 0
    assert exported(run) == uninterrupted
    assert {e.phase for e in of(run, events.Metric, attempt=2)} == {"e2e_qp"}
    assert all(e.restored for e in of(run, events.BlockFinished, attempt=2))


def test_how_many_sequences_pass_at_a_time_is_chosen_once(
    make: Make, engine: Engine, finished_once: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of another moment would choose otherwise, and other sums would be added up."""
    settings = {**SLOW, "e2e_qp.micro_batch_size": 0}
    whole = finished_once(**settings)
    chosen = [event.plan["micro_batches"]["e2e_qp"] for event in of(whole, events.Plan)]
    assert chosen[0] > 1
    run = make(**settings)
    child = engine(run)
    child.until(lambda: finished_blocks(run))
    child.send(signal.SIGTERM)
    assert child.code() == 75, output(run)
    monkeypatch.setattr(NetworkTraining, "micro_batches", lambda self, config: [1])
    assert run_here(run) == 0
    assert of(run, events.Plan, attempt=2)[0].plan["micro_batches"] == {"e2e_qp": 1}
    assert exported(run) == exported(whole)

    asked = make(**SLOW)
    assert run_here(asked) == 0
    assert exported(asked) != exported(whole), "nothing would be noticed here"


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    make: Make, engine: Engine, uninterrupted: dict[str, str]
) -> None:
    run = make(**SLOW)
    for moment in (0.4, 0.9, 1.4):
        child = engine(run)
        child.until(lambda: run_state(run) == "running")
        time.sleep(moment)
        child.end()
    assert run_here(run) == 0
    assert exported(run) == uninterrupted


def test_blocks_rounded_without_training_are_restored_too(make: Make, finished_once: Make) -> None:
    settings = {"block_ap.enabled": False, "e2e_qp.enabled": False}
    run, whole = make(**settings), finished_once(**settings)
    control.request(run, "stop")
    assert run_here(run) == 75
    assert run_here(run) == 0
    assert run_here(run) == 0
    assert [e.restored for e in of(run, events.BlockFinished, attempt=3)] == [True] * 4
    assert exported(run) == exported(whole)


# -- asked to stop -------------------------------------------------------------------------------------


@pytest.mark.alone
def test_sigterm_stops_at_a_step_and_the_run_can_be_resumed(
    make: Make, engine: Engine, uninterrupted: dict[str, str]
) -> None:
    run = make(**SLOW)
    child = engine(run)
    child.until(lambda: training(run, "block_ap"))
    asked = time.monotonic()
    child.send(signal.SIGTERM)
    assert child.code() == 75
    assert time.monotonic() - asked < 10
    assert run_state(run) == "stopped"
    assert of(run, events.RunFinished)[-1].exit_code == 75
    assert not of(run, events.Error)
    assert "Traceback" not in output(run)
    assert run_here(run) == 0
    assert run_state(run) == "done"
    assert exported(run) == uninterrupted


def test_a_signal_while_the_libraries_load_is_a_stop_and_not_a_crash(make: Make, engine: Engine) -> None:
    run = make(**SLOW)
    child = engine(run, module=True)
    child.until(lambda: holds_back(child.pid, signal.SIGTERM))
    child.send(signal.SIGSTOP)  # so that nothing changes between looking and sending
    assert holds_back(child.pid, signal.SIGTERM), "it was seen too late"
    assert not of(run, events.RunStarted)
    child.send(signal.SIGTERM)
    assert waits(child.pid, signal.SIGTERM)
    child.send(signal.SIGCONT)
    assert child.code() == 75
    assert run_state(run) == "stopped"


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.2, 0.4])
def test_a_signal_before_the_engine_hears_anything_ends_it_or_stops_it_and_costs_the_run_nothing(
    make: Make, engine: Engine, moment: float
) -> None:
    """How far a process is after so many seconds is decided by the system. As long as nothing of ours runs in
    it, it ends as every program does, and the run has crashed with nothing done; then the signal is a stop.
    """
    run = make()
    child = engine(run, module=True)
    time.sleep(moment)
    os.kill(child.pid, signal.SIGTERM)  # not ``send``, which waits until it hears
    code = child.code()
    assert (code, run_state(run)) in ((-signal.SIGTERM, "crashed"), (75, "stopped"))
    assert "Traceback" not in output(run)
    assert bool(of(run, events.RunStarted)) == (code == 75)
    assert not of(run, events.Error)
    assert run_here(run) == 0


def test_a_second_signal_aborts(make: Make, engine: Engine) -> None:
    run = make(**SLOW)
    child = engine(run)
    child.until(lambda: training(run, "block_ap"))
    child.send(signal.SIGSTOP)  # so that both arrive before it can act on the first
    child.send(signal.SIGINT)
    child.send(signal.SIGTERM)
    child.send(signal.SIGCONT)
    assert child.code() == 143
    finished = of(run, events.RunFinished)[-1]
    assert (finished.outcome, finished.exit_code) == ("aborted", 143)
    assert run_state(run) == "aborted"


@pytest.mark.parametrize(("request_", "code", "state"), [("stop", 75, "stopped"), ("abort", 130, "aborted")])
def test_a_request_in_the_control_directory_is_acknowledged_and_obeyed(
    make: Make, engine: Engine, request_: control.Action, code: int, state: str
) -> None:
    run = make(**SLOW)
    child = engine(run)
    child.until(lambda: training(run, "block_ap"))
    number = control.request(run, request_)
    assert child.code() == code
    assert run_state(run) == state
    assert [(e.request, e.id) for e in of(run, events.ControlAck)] == [(request_, number)]
    assert not control.pending(run)


def test_a_stop_is_heard_in_evaluation_and_export_and_leaves_no_half_export(make: Make) -> None:
    run = make()
    assert run_here(make()) == 0  # tokens are cached now, so the request below is not seen while drawing
    control.request(run, "stop")
    assert run_here(run) == 75
    assert not list(run.export_dir.iterdir())
    assert run_here(run) == 0
    assert [path.name for path in run.export_dir.iterdir()] == ["gptq_v2"]


# -- continued with something else ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("block_ap.epochs", 2, ("1", "2")),
        ("grid.bits", 4, ("3", "4")),
        ("runtime.seed", 7, ("0", "7")),
        ("evaluation.windows", 3, ("4", "3")),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    finished_copy: Make, field: str, value: object, words: tuple[str, ...]
) -> None:
    run = finished_copy()
    before = {path: path.read_bytes() for path in run.checkpoints_dir.rglob("*") if path.is_file()}
    change(run, **{field: value})
    assert run_here(run) == 8
    error = failure(run, 8)
    assert error.where == field
    for word in words:
        assert word in error.message
    after = {path: path.read_bytes() for path in run.checkpoints_dir.rglob("*") if path.is_file()}
    assert after == before, "a refused attempt must not touch the checkpoints"


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"runtime.seed": 7}, 8),
        ({"runtime.device": "cuda:99"}, 3),
        ({"block_ap.batch_size": 0}, 2),
        ({"grid.group_size": 7}, 2),
    ],
)
def test_a_refused_attempt_leaves_a_run_what_it_was(
    make: Make, engine: Engine, changed: dict[str, object], code: int
) -> None:
    """Nothing came of it but what it was told: a stopped run is stopped, a finished one finished."""
    run = make(**SLOW)
    as_made = run.config_toml.read_bytes()
    child = engine(run)
    child.until(lambda: finished_blocks(run))
    child.send(signal.SIGTERM)
    assert child.code() == 75, output(run)
    for was in ("stopped", "done"):
        config = run.config_toml.read_text()
        for field, value in changed.items():
            section, _, name = field.partition(".")
            lines = [line for line in config.splitlines() if not line.startswith(f"{name} =")]
            lines.insert(lines.index(f"[{section}]") + 1, f"{name} = {json.dumps(value)}")
            config = "\n".join(lines) + "\n"
        run.config_toml.write_text(config)
        assert run_here(run) == code
        finished = of(run, events.RunFinished)[-1]
        assert (finished.outcome, finished.exit_code) == ("failed", code)
        assert of(run, events.Error)[-1].attempt == finished.attempt
        assert load_state(run).outcome == run_state(run) == was
        run.config_toml.write_bytes(as_made)
        assert run_here(run) == 0
    assert load_state(run).outcome == "done"


def test_settings_that_decide_nothing_may_change(finished_copy: Make) -> None:
    run = finished_copy()
    before = exported(run)
    change(run, **{"runtime.activation_store": "disk", "name": "renamed"})
    assert run_here(run) == 0
    assert exported(run)["model.safetensors"] == before["model.safetensors"]


def test_changed_text_is_refused(make: Make, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} times {m} is {n * m}." for n in range(40) for m in range(40)))
    run = make(**{"data.source": str(text)})
    assert run_here(run) == 0
    text.write_text(text.read_text().replace("times", "plus"))
    assert run_here(run) == 8
    assert failure(run, 8).where == "data"


def test_a_changed_model_is_refused(make: Make, stories: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in stories.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    settings = {"model.source": str(model), "grid.bits": 8, "grid.group_size": -1}
    run = make(**settings, **{"block_ap.enabled": False, "e2e_qp.enabled": False})
    assert run_here(run) == 0
    config = json.loads((model / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (model / "config.json").write_text(json.dumps(config))
    assert run_here(run) == 8
    assert failure(run, 8).where == "model"


def test_only_one_engine_works_on_a_run_and_the_second_is_told_who(
    make: Make, engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make(**SLOW)
    child = engine(run)
    child.until(lambda: training(run, "block_ap"))
    assert run_here(run) == 3
    said = capfd.readouterr().err
    assert f"process {child.pid}" in said
    assert len(said.strip().splitlines()) == 1
    assert not of(run, events.Error)
    assert not of(run, events.RunFinished)
    assert child.alive()
