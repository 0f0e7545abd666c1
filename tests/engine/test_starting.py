"""What is seen of an engine while it starts, and of what it does with a finished run; with real engines."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from engine_runs import Child, log, of, output, run_here

from engine.run import control, events
from engine.run.directory import RunDirectory
from engine.run.liveness import look, run_state
from engine.run.shown import show_run, summarize
from engine.run.state import load_state
from engine.run.status import read_status
from eqat_tui.feed import LiveFeed

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]


def test_an_engine_says_at_once_that_it_starts_and_what_it_loads(make: Make, engine: Engine) -> None:
    """Before torch is imported; a kill just then is known, and so is whose attempt it was."""
    run = make()
    child = engine(run, module=True)
    child.until(lambda: of(run, events.AttemptStarting))
    child.until(lambda: (said := read_status(run)) is not None and said.pid == child.pid)
    child.send(signal.SIGSTOP)
    assert not of(run, events.RunStarted), "the libraries were faster than we"
    status = read_status(run)
    assert status is not None
    assert status.doing in ("reading the configuration", "loading torch and transformers")
    shown = summarize(run)
    assert (shown["state"], shown["phase"], shown["doing"]) == ("running", None, status.doing)
    feed = LiveFeed(run)
    view = feed.poll()
    assert (view.state.phase, view.doing) == (None, status.doing)
    assert view.starting_s is not None
    child.send(signal.SIGKILL)
    child.code()
    assert run_state(run) == "crashed"
    told = feed.poll().journal
    assert "attempt 1 starts" in told[0].text
    assert "attempt 1 died" in told[-1].text
    assert run_here(run) == 0
    assert [event.attempt for event in of(run, events.AttemptStarting)] == [1, 2]
    assert run_state(run) == "done"


def test_an_evaluation_is_a_job_of_its_own_that_can_be_stopped(finished_copy: Make, engine: Engine) -> None:
    done = finished_copy()
    before = load_state(done)
    stopped = engine(done, arguments=("--task", "eval"), before=slow_evaluations)
    stopped.until(lambda: (look(done).work or (None,))[0] == "eval")
    stopped.until(lambda: (load_state(done).at_work.steps or 0) > 0)
    found = show_run(done)
    assert (found["state"], found["attempt"], found["outcome"]) == ("done", 1, "done")
    assert found["phases"] == show_run(done)["phases"]
    job = found["job"]
    assert (job["task"], job["state"], job["position"]["phase"]) == ("eval", "running", "evaluate_e2e_qp")
    assert 0 <= job["position"]["step"] <= job["position"]["steps"]
    view = LiveFeed(done).poll()
    assert (view.liveness, view.job and view.job.task, view.live) == ("done", "eval", True)
    control.request(done, "stop")
    assert stopped.code() == 75
    after = load_state(done)
    assert run_state(done) == "done"
    assert (after.attempt, after.phases, after.seconds) == (1, before.phases, before.seconds)
    assert after.job is not None
    assert after.job.outcome == "stopped"
    assert run_here(done, "--task", "eval") == 0
    assert load_state(done).perplexity() == before.perplexity()


def slow_evaluations() -> None:
    """In this process: time to look at an evaluation of a tenth of a second."""
    import engine.evaluation.beside as measuring

    real = measuring._measures

    def slowly(*arguments: object, **more: object) -> object:
        time.sleep(3)
        return real(*arguments, **more)  # type: ignore[arg-type]

    measuring._measures = slowly  # type: ignore[assignment]


def test_evaluations_exports_and_samples_count_what_they_do(finished_copy: Make) -> None:
    """To the end: a bar that never gets there is none."""
    from engine.reporter import Reporter

    counted: dict[str, list[tuple[int, int]]] = {}
    real = Reporter.step

    def step(self: Reporter, done: int, total: int) -> None:
        counted.setdefault(self.phase_name, []).append((done, total))
        real(self, done, total)

    done = finished_copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "step", step)
        assert run_here(done, "--task", "eval") == 0
        assert run_here(done, "--task", "export") == 0
        assert run_here(done, "--task", "generate", "--prompt", "ab", "--new-tokens", "4") == 0
    for phase, most in {"evaluate_e2e_qp": 1.0, "export": 1.0, "generate": 0.8}.items():
        steps = counted[phase]
        assert len({total for _, total in steps}) == 1, phase
        assert [count for count, _ in steps] == sorted(count for count, _ in steps), phase
        assert steps[-1][0] / steps[-1][1] >= most, (phase, steps[-1])
        assert len(steps) >= 8, (phase, steps)


def test_a_library_that_cannot_be_loaded_is_one_line(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()
    monkeypatch.setitem(__import__("sys").modules, "engine.pipeline", None)
    assert run_here(run) == 3
    (error,) = of(run, events.Error)
    assert "cannot be loaded" in error.message
    assert "eqat doctor" in error.hint
    assert isinstance(log(run)[-1], events.RunFinished), output(run)
    assert os.path.exists(run.events_path)
