"""Numbers that a person plans the day by: they agree with each other and say what they rest on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import msgspec
import pytest
from logs import RECORDED, Log

from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.liveness import Work
from engine.run.lock import RunLock
from engine.run.state import RunState
from engine.run.status import Launched, Status, write_status
from engine.run.submitted import Submitted, write_submitted
from engine.system.files import atomic_write_json
from eqat_tui.feed import LiveFeed, RunView
from eqat_tui.lines import plain
from eqat_tui.views import monitor, run_machine

Recorded = Callable[[str], RunDirectory]


def shares(log: Log) -> list[tuple[bool, float]]:
    """The part of the run that is shown as done, after each event, and whether a phase ended with it."""
    state, found = RunState(), []
    for event in log.events:
        state = state.apply(event)
        share = monitor.share_done(state)
        if share is not None:
            found.append((isinstance(event, events.PhaseFinished), share))
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_done_never_becomes_less_before_a_phase_is_measured(name: str) -> None:
    """At the end of a phase what it took replaces what was planned; in between there is only more."""
    found = shares(RECORDED[name]("run"))
    steps = itertools.pairwise(found)
    assert all(after >= before for (_, before), (ends, after) in steps if not ends)
    last = found[-1][1]
    assert last == pytest.approx(1.0) if name == "finished" else 0.0 < last < 1.0


def test_the_share_of_the_run_agrees_with_the_time_left() -> None:
    """Whatever the plan promised: 9 s of work with 131 s to come is no 84 %."""
    view = at_work(Status(eta_s=131.0))
    worked = monitor.elapsed(view.state)
    share = worked / (worked + 131.0)
    assert f" {share:.0%}  " in plain(monitor.progress(view, 120)[1])
    assert monitor.share_done(view.state, 131.0) == pytest.approx(share)
    assert monitor.share_done(view.state, 0.0) == 1.0
    beyond = at_work(Status(eta_s=0.0, eta_measured=False, over_s=42.0))
    assert "100%" not in plain(monitor.progress(beyond, 120)[1]), "what is left is not known"


def test_without_a_time_left_a_finished_phase_weighs_what_it_took() -> None:
    """Stopped: 12 s were planned for a phase that took half a second, and the training has just begun."""
    log = Log()
    log.attempt_begins("run")
    plan = {
        "blocks": 4,
        "phases": [{"name": "prepare", "seconds": 12.0}, {"name": "block_ap", "seconds": 2.0}],
    }
    log.add(events.PhaseStarted(phase="prepare", index=0, phases=2))
    log.add(events.PhaseFinished(phase="prepare", seconds=0.5))
    log.add(events.PhaseStarted(phase="block_ap", index=1, phases=2))
    state = msgspec.structs.replace(RunState().apply_all(log.events), plan=plan)
    assert monitor.share_done(state) == pytest.approx(0.5 / 2.5)


def at_work(status: Status | None) -> RunView:
    """A run that works, and what its engine says of itself."""
    log = Log()
    log.until_block_ap("run")
    state = RunState().apply_all(log.events).with_status(status)
    return RunView(id="run", path="/run", state=state, liveness="running", now=log.t)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status(eta_s=900.0, eta_measured=False), "about 15:00 left by the plan"),
        (Status(eta_s=500.0), "8:20 left"),
        (Status(eta_s=0.0, eta_measured=False, over_s=42.0), "0:42 longer than planned"),
        (Status(eta_s=65.0, over_s=42.0), "0:42 longer than planned, then about 1:05"),
        (Status(eta_s=900.0, eta_measured=False, over_s=4.0), "about 15:00 left by the plan"),
        (Status(), ""),
        (None, ""),
    ],
)
def test_the_time_left_is_the_engines_and_says_what_it_goes_by(status: Status | None, words: str) -> None:
    view = at_work(status)
    assert monitor.remaining(view) == words
    assert words in plain(monitor.progress(view, 120)[1])
    ended = msgspec.structs.replace(view, liveness="stopped")
    assert monitor.remaining(ended) == ""


def test_an_evaluation_has_a_bar_although_it_has_no_steps_of_a_training() -> None:
    log = Log()
    log.attempt_begins("run")
    log.add(events.PhaseStarted(phase="evaluate_fp", index=1, phases=8))
    state = RunState().apply_all(log.events).with_status(Status(phase="evaluate_fp", step=30, steps=120))
    view = RunView(id="run", path="/run", state=state, liveness="running", now=log.t)
    shown = plain(monitor.progress(view, 100)[0])
    assert " 25%" in shown
    assert "█" in shown
    assert "step" not in shown


def test_a_gpu_that_was_not_read_yet_is_not_called_unused() -> None:
    log = Log()
    log.attempt_begins("run")
    for state in (RunState(), RunState().apply_all(log.events)):
        view = RunView(id="run", path="/run", state=state, liveness="running", now=log.t)
        assert plain(run_machine.machine_lines(view, 80)[0]).split() == ["GPU", "nothing", "measured", "yet"]


def test_an_engine_that_has_just_been_started_shows_nothing_of_the_attempt_before(recorded: Recorded) -> None:
    run = recorded("stopped")
    atomic_write_json(run.launch_path, Launched(pid=1, host="h", attempt=2, t=2e9, created=2e9))
    with RunLock(run.lock_path):
        view = LiveFeed(run).poll()
    assert view.liveness == "starting"
    assert (view.state.phase, view.asked) == (None, "")
    assert plain(monitor.progress(view, 80)[0]).startswith("starting")
    assert view.state.block_rows  # what was achieved stays


@pytest.mark.usefixtures("no_slurm")
def test_a_run_that_waits_in_slurm_says_so_and_where_it_runs_elsewhere(recorded: Recorded) -> None:
    run = recorded("stopped")
    write_submitted(run, Submitted(job="123_4", name="eqat-sweep", t=2e9))
    view = LiveFeed(run).poll()
    assert (view.liveness, view.live) == ("waiting", True)
    assert monitor.state_span(view)[0] == "· waiting in Slurm as job 123_4 (which cannot be asked from here)"
    assert plain(monitor.progress(view, 80)[0]).startswith("waiting")
    assert view.state.error is None

    now = time.time()
    write_status(run, Status(phase="block_ap", attempt=2, heartbeat=now, host="n7", machine="another", pid=4))
    atomic_write_json(run.launch_path, Launched(pid=4, host="n7", attempt=2, t=2e9, created=2e9))
    view = LiveFeed(run).poll()
    assert monitor.state_span(view)[0] == "▶ starting on n7"


def test_a_block_that_is_only_passed_on_is_no_training(recorded: Recorded) -> None:
    run = recorded("resumed")
    view = LiveFeed(run).poll()
    state = msgspec.structs.replace(view.state, block=1, step=None, steps=None)
    view = msgspec.structs.replace(view, state=state, liveness="running")
    assert "passing on" in plain(monitor.progress(view, 100)[0])
    rows = [plain(row) for row in monitor.block_table(view, 50)[1]]
    assert "kept" in rows[1]
    assert "now" not in rows[1]


def test_an_export_made_later_leaves_the_run_its_phases() -> None:
    log = RECORDED["finished"]("run")
    state = RunState().apply_all(log.events)
    log.attempt_begins("run")
    log.events[-2] = msgspec.structs.replace(log.events[-2], task="export")  # type: ignore[call-arg]
    log.add(events.PhaseStarted(phase="export", index=1, phases=2))
    later = RunState().apply_all(log.events)
    work = Work("export", later.newest_attempt, "running")
    view = RunView(id="run", path="/run", state=later, liveness="done", job=work, now=log.t)
    assert plain(monitor.progress(view, 80)[0]).startswith("export  ")
    assert plain([monitor.state_span(view)]) == "✓ done, ▶ export"
    assert "attempt" not in plain(monitor.title(view, 80)), "the run had one"
    done = msgspec.structs.replace(view, job=None)
    assert plain(monitor.progress(done, 80)[1]) == f"{len(state.phases)} phases"


def test_hints_of_the_command_line_are_left_out() -> None:
    assert monitor.hint_for_app("choose another --to") == ""
    assert monitor.hint_for_app("eqat runs lists the runs") == ""
    assert monitor.hint_for_app("halve block_ap.lr_weight") == " (halve block_ap.lr_weight)"
