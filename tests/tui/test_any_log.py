"""Whatever a log holds, every view of it is words that fit: nothing raises, is raw or goes on without end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from any_logs import JSON, LOGS, NASTY, as_written, plans
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import make_run

from engine.run import events
from engine.run.comparison import Compared
from engine.run.events import Event
from engine.run.shown import render, show_run, summarize
from engine.run.state import RunState
from engine.run.status import Status
from engine.system.printable import hides
from eqat_tui import display, run_text
from eqat_tui.charts import chart
from eqat_tui.feed import LiveFeed, Replay, ReplayFeed, RunView
from eqat_tui.journal import Journal
from eqat_tui.lines import Line, width_of
from eqat_tui.plan_text import plan_text
from eqat_tui.tracking.jsonl import line_of
from eqat_tui.tracking.points import Points
from eqat_tui.views import comparison, monitor, result, run_charts, run_machine, runs, setup

LIVENESS = (
    "created",
    "running",
    "hung",
    "crashed",
    "done",
    "stopped",
    "failed",
    "aborted",
    "starting",
    "gone",
)
MOST_LINES = 2500
MOST_LETTERS = 400_000


def view_of(log: Sequence[Event], liveness: Any, config: Any = None, **status: Any) -> RunView:
    journal, state = Journal(), RunState(id="20251124-1600-x-0001").apply_all(log)
    journal.take(log)  # type: ignore[arg-type]
    state = msgspec.structs.replace(state, status=Status(**status))
    replay = Replay(position=0.5, speed=10.0, paused=False) if status.get("step") == 7 else None
    return RunView(
        id="20251124-1600-x-0001",
        path="runs/x",
        state=state,
        liveness=liveness,
        now=1_764_000_000.0,
        config=config,
        journal=journal.told("killed" if liveness == "crashed" else ""),
        replay=replay,
    )


def lines_of(view: RunView, width: int) -> Iterator[Line]:
    """All that the app's screens say of a run."""
    state = view.state
    yield monitor.title(view, width)
    yield [monitor.state_span(view)]
    yield from monitor.progress(view, width)
    yield from monitor.notices(view, width)
    yield from run_machine.machine_lines(view, width)
    yield from monitor.journal(view.journal, width)
    header, rows = monitor.block_table(view, width)
    yield from [header, *rows]
    for series, log in (
        (run_charts.loss_series(view, None)[1], True),
        (run_charts.loss_series(view, 3)[1], False),
        (run_charts.profile_series(state), True),
        (run_charts.memory_series(state), False),
    ):
        steps = [m.steps for m in state.metrics][-1:] or [40]
        for x_range in (None, (1, steps[0]) if steps[0] > 1 else None):
            yield from chart(series, width, 8, log=log, x_name="step", x_range=x_range)
    yield from result.perplexities(state, width)
    yield result.headline(view, width)
    yield from result.samples(state, width)
    yield from result.exports(view, width)
    shown = {**render(state, state=view.liveness, config=view.config), "path": view.path, "origin": None}
    yield from result.figures(shown, width)


def texts_of(view: RunView) -> Iterator[str]:
    """All that the command line says of a run."""
    state = view.state
    shown = {**render(state, state=view.liveness, config=view.config), "path": view.path, "origin": None}
    yield run_text.report(shown)
    yield run_text.samples(shown)
    yield display.lasting(display.position(state))
    yield display.lasting("  ".join(display.measurements(state)))
    assert 0.0 <= (display.fraction(state) or 0.0) <= 1.0


def check_lines(lines: Sequence[Line], width: int) -> None:
    assert len(lines) <= MOST_LINES
    for row in lines:
        assert width_of(row) <= max(width, 110)
        assert not any(hides(letter) for text, _ in row for letter in text if letter not in "\n")


@settings(max_examples=150)
@given(
    LOGS,
    st.sampled_from(LIVENESS),
    st.none() | JSON,
    st.sampled_from((40, 80, 130)),
    st.sampled_from((None, 1e300, -1.0, 0.0)),
)
def test_every_view_of_any_log_is_lines_that_fit(
    log: tuple[Event, ...], liveness: str, config: Any, width: int, eta: float | None
) -> None:
    config = config if isinstance(config, dict) else None
    view = view_of(log, liveness, config, eta_s=eta, heartbeat=1e15, waiting=NASTY[1], step=len(log) % 9)
    check_lines(list(lines_of(view, width)), width)
    for text in texts_of(view):
        assert len(text) <= MOST_LETTERS
    plain = display.PlainDisplay(interval=0.0)
    plain.update(view.state, log)


@settings(max_examples=150)
@given(plans() | JSON)
def test_any_plan_is_shown(plan: Any) -> None:
    assert len(plan_text(plan)) <= MOST_LETTERS
    check_lines(setup.plan_lines(plan, 60), 60)


@settings(max_examples=40)
@given(st.lists(LOGS, min_size=1, max_size=3))
def test_any_runs_are_listed_shown_compared_and_replayed(
    tmp_path_factory: pytest.TempPathFactory, logs: list[tuple[Event, ...]]
) -> None:
    place = tmp_path_factory.mktemp("runs")
    found = []
    for index, log in enumerate(logs):
        run = make_run(place, None, name=f"20251124-160{index}-x-000{index}")
        run.events_path.write_bytes(as_written(log))
        found.append(run)
    rows = [summarize(run) for run in found]
    assert len(run_text.runs_table(rows)) <= MOST_LETTERS
    for run, row in zip(found, rows, strict=True):
        assert len(run_text.report(show_run(run))) <= MOST_LETTERS
        check_lines(runs.details(row, 80), 80)
        view = LiveFeed(run).poll()
        assert not view.problem.startswith("cannot be read")
        check_lines(list(lines_of(view, 80)), 80)
        replay = ReplayFeed(run, 1e4)
        replay.seek(1.0)
        check_lines(list(lines_of(replay.poll(), 80)), 80)
    for sort in runs.SORTS:
        header, listed = runs.rows(runs.chosen(rows, "x", sort), frozenset(), 80, 0.0)
        check_lines([header, *listed], 80)
    compared = [Compared(run, "ABC"[index]) for index, run in enumerate(found)]
    check_lines(comparison.differences(compared, 80), 80)
    check_lines(chart(comparison.overlaid(compared), 80, 10, log=True), 80)


# -- sizes ---------------------------------------------------------------------------------------------


def started(**changes: Any) -> events.RunStarted:
    return events.RunStarted(
        **{"id": "x", "pid": 1, "host": "h", "device": "cpu", "versions": {}, "argv": [], **changes}
    )


def huge_logs() -> dict[str, list[Event]]:
    """Sizes that no run has."""
    phase, far = events.PhaseStarted(phase="block_ap", index=0, phases=1), 10**12
    long = "d" * 100_000
    return {
        "names": [started(device=long, host=long, id=long, task=long, versions={"eqat": "²." * 9})],
        "blocks": [events.BlockStarted(phase="block_ap", block=n, blocks=far) for n in range(20_000)],
        "far block": [phase, events.BlockStarted(phase="block_ap", block=far, blocks=far)],
        "planned blocks": [started(), events.Plan(plan={"blocks": 10**12, "seconds": 1e15, "phases": 7})],
        "warnings": [events.Warning(code="x", message="m" * 50, hint="h") for _ in range(100_000)],
        "exports": [
            events.Export(format=f"{n}", path=long, verified=True, bytes=1, fp_bytes=1, bits_per_weight=9)
            for n in range(500)
        ],
        "samples": [
            events.Sample(stage="fp", prompt="p" * 2_000_000, text="中" * 2_000_000),
            events.Sample(stage="e2e_qp", prompt="p", text="word " * 500_000, tokens=10**12),
        ],
        "metrics": [
            events.Metric(phase="block_ap", block=n % 7, step=n, steps=0, epoch=0, loss=1e300, lr={"x": 1})
            for n in range(20_000)
        ],
        "tasks": [
            events.Eval(
                stage="fp", perplexity=0.0, tokens=0, sequence_length=0, seconds=0, corpus="c" * 99_999,
                accuracy={f"t{n}": 1e300 for n in range(5_000)},
            )
        ],
        "clocks": [started(t=t) for t in (1e15, -1e15, 0.0, 1e300, -1e300)],
        "error": [
            events.Error(code="x", where="w" * 9_999, message="m " * 99_999, hint="", exit_code=1),
            events.RunFinished(outcome="failed", exit_code=10**12, seconds=-1.0),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("name", huge_logs())
def test_a_log_of_any_size_is_shown_in_a_moment_and_on_few_lines(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None, name="20251124-1600-x-0001")
    run.events_path.write_bytes(as_written(huge_logs()[name]))
    view = LiveFeed(run).poll()
    assert not view.problem.startswith("cannot be read")
    began = time.process_time()
    check_lines(list(lines_of(view, 80)), 80)
    for text in texts_of(view):
        assert len(text) <= MOST_LETTERS
    assert time.process_time() - began < 3.0


def test_blocks_of_a_damaged_log_take_no_time(tmp_path: Path) -> None:
    """Every event of a block copies the table of blocks, which must not grow without end."""
    log = [
        events.BlockStarted(phase=phase, block=n, blocks=1)
        for n in range(20_000)
        for phase in ("rtn", "block_ap")
    ]
    began = time.process_time()
    state = RunState().apply_all(log)
    assert time.process_time() - began < 10.0
    assert len(state.trained_blocks()) <= 1024


@given(LOGS)
def test_any_log_is_points_that_every_reader_of_json_holds(log: tuple[Event, ...]) -> None:
    points = Points()
    for event in log:
        point = points.of(event)
        if point is not None:
            line = line_of(point)
            assert line.isascii()
            assert not any(hides(letter) for letter in line)
            assert json.loads(line)["step"] == point.step
            assert all(len(name) < 400 for name in (*point.values, *point.texts))
