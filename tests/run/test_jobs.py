"""What is done with a finished run is a job beside it: the run stays what it is, whatever becomes of that."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from engine.errors import PreflightError
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.liveness import Look, Work, look, run_state
from engine.run.lock import RunLock
from engine.run.shown import show_run, summarize
from engine.run.state import RunState, load_state
from engine.run.status import Launched, Status, write_status
from engine.system.files import atomic_write_json
from eqat_tui import actions
from eqat_tui.run_text import report, runs_table

LEAVES: dict[str, Any] = {"task": "eval", "leaves": "done"}


def begins(run: RunDirectory, **more: Any) -> events.RunStarted:
    return events.RunStarted(
        id=run.id, pid=os.getpid(), host="h", device="cpu", versions={"torch": "2"}, argv=[], **more
    )


@pytest.fixture
def done(run: RunDirectory) -> RunDirectory:
    """A run that is done, of one attempt."""
    say(
        run,
        1,
        begins(run),
        events.PhaseStarted(phase="evaluate_rtn", index=0, phases=1),
        events.Eval(stage="rtn", perplexity=90.0, tokens=9, sequence_length=9, seconds=1.0, corpus="x"),
        events.PhaseFinished(phase="evaluate_rtn", seconds=4.0, peak_host_bytes=7),
        events.RunFinished(outcome="done", exit_code=0, seconds=5.0),
    )
    return run


def say(run: RunDirectory, attempt: int, *said: events.Event) -> None:
    with EventWriter(run.events_path, attempt) as writer:
        for event in said:
            writer.emit(event)


@contextmanager
def evaluating(run: RunDirectory) -> Iterator[None]:
    """An engine evaluates ``run``, and is in the 3rd of 10 windows."""
    with RunLock(run.lock_path):
        say(
            run,
            2,
            events.AttemptStarting(pid=os.getpid(), host="h", **LEAVES),
            begins(run, **LEAVES),
            events.PhaseStarted(phase="evaluate_rtn", index=1, phases=2),
            events.Memory(host_used=1234),
        )
        status = Status(phase="evaluate_rtn", step=3, steps=10, eta_s=70.0, heartbeat=time.time(), attempt=2)
        assert write_status(run, status)
        yield


def words_of(text: str) -> str:
    """Without what makes columns of them."""
    return " ".join(text.split())


def without_job(state: RunState) -> dict[str, Any]:
    clocks = ("job", "event_count", "last_t", "last_mono", "status")
    return {name: getattr(state, name) for name in state.__struct_fields__ if name not in clocks}


def test_a_run_stays_done_while_it_is_evaluated_and_the_job_has_its_own_place(done: RunDirectory) -> None:
    before = load_state(done)
    with evaluating(done):
        assert look(done) == Look("done", Work("eval", 2, "running"))
        state = load_state(done)
        assert without_job(state) == without_job(before)
        job = state.at_work
        assert job is state.job
        assert (job.task, job.attempt, job.phase, job.step, job.steps) == ("eval", 2, "evaluate_rtn", 3, 10)
        assert (job.eta_s, state.eta_s) == (70.0, None)
        assert job.memory is not None
        row = summarize(done)
        assert (row["state"], row["job"]["state"], row["job"]["eta_s"]) == ("done", "running", 70.0)
        assert row["job"]["position"]["step"] == 3
        assert (row["eta_s"], row["phase"]) == (None, "evaluate_rtn")
        assert "done, evaluation 30%" in runs_table([row])
        told = words_of(report(show_run(done)))
        assert "evaluation evaluate round-to-nearest, 30%, 1:10 left" in told


def test_what_a_job_achieves_is_the_runs_and_how_it_ended_is_its_own(done: RunDirectory) -> None:
    with evaluating(done):
        measured = events.Eval(
            stage="rtn", perplexity=80.0, tokens=9, sequence_length=9, seconds=1.0, corpus="x"
        )
        say(done, 2, measured, events.Warning(code="w", message="slow"))
        finished = events.RunFinished(outcome="done", exit_code=0, seconds=9.0, leaves="done", task="eval")
        say(done, 2, finished)
        assert look(done).state == "done", "its process has not gone yet"
    state = load_state(done)
    assert state.perplexity()["rtn"] == 80.0
    assert [warning.code for warning in state.warnings] == ["w"]
    assert (state.seconds, state.attempt, [row.seconds for row in state.phases]) == (5.0, 1, [4.0])
    assert state.job is not None
    assert (state.job.outcome, state.job.seconds) == ("done", 9.0)
    assert "last evaluation" not in report(show_run(done))


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [
        ("stopped", 75, "last evaluation stopped"),
        ("aborted", 130, "last evaluation aborted"),
        ("failed", 4, "last evaluation failed: data.source: too short"),
        (None, None, "last evaluation its engine died: killed, or out of host memory"),
    ],
)
def test_a_job_that_does_not_succeed_leaves_the_run_done_with_a_line_about_it(
    done: RunDirectory, outcome: Any, code: int | None, words: str
) -> None:
    with evaluating(done):
        if outcome == "failed":
            error = events.Error(code="data", where="data.source", message="too short", hint="", exit_code=4)
            say(done, 2, error)
        if outcome is not None:
            finished = events.RunFinished(outcome=outcome, exit_code=code or 0, seconds=1.0, leaves="done")
            say(done, 2, finished)
    assert look(done) == Look("done", None)
    shown = show_run(done)
    assert (shown["state"], shown["error"], shown["exit_code"]) == ("done", None, 0)
    assert (shown["job"]["state"], shown["job"]["exit_code"]) == (outcome or "crashed", code)
    assert words in words_of(report(shown))
    assert "last evaluation" not in runs_table([summarize(done)])


def test_an_engine_that_was_launched_for_a_job_and_has_not_spoken_is_one(done: RunDirectory) -> None:
    import psutil

    me = os.getpid()
    created, now = psutil.Process(me).create_time(), time.time() + 1
    import socket

    launched = Launched(pid=me, host=socket.gethostname(), attempt=2, t=now, created=created, task="export")
    atomic_write_json(done.launch_path, launched)
    assert look(done) == Look("done", Work("export", 2, "starting"))
    assert summarize(done)["job"]["state"] == "starting"
    with RunLock(done.lock_path):
        assert look(done, now=now) == Look("done", Work("export", 2, "running"))
        assert look(done, now=now + 1000).work == Work("export", 2, "hung")
    atomic_write_json(done.launch_path, Launched(pid=me, host="h", attempt=2, t=now, created=1.0, task="run"))
    with RunLock(done.lock_path):
        assert run_state(done) == "running", "of the run itself"


def test_a_run_that_is_resumed_has_no_job_any_more(done: RunDirectory) -> None:
    with evaluating(done):
        pass
    say(done, 3, begins(done), events.PhaseStarted(phase="block_ap", index=1, phases=2))
    state = load_state(done)
    assert (state.job, state.phase, state.attempt, state.outcome) == (None, "block_ap", 3, None)


def test_stopping_a_job_speaks_of_the_job(done: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with evaluating(done):
        assert actions.stop(done, abort=False, wait=False) == 0
    said = capsys.readouterr().err
    assert f"asked the evaluation of {done.id} to stop; the run stays done" in said
    assert "eqat eval" in said
    assert "resume" not in said


def test_a_run_that_is_being_evaluated_is_not_resumed(done: RunDirectory) -> None:
    with evaluating(done), pytest.raises(PreflightError, match="is done, and its evaluation is running"):
        actions.resume(done, {}, detach=True, as_json=False)
