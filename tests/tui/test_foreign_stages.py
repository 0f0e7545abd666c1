"""Stages that are not known here are drawn by their names, and those of an extension by their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine_runs
import msgspec
import pytest
import toys
from app_tools import app_of, drive, picture, press, shown, told, until, view_of
from logs import RECORDED, Log, make_run
from textual.pilot import Pilot

from engine.config.stages import STAGES, Stage
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.shown import show_run, summarize
from engine.run.state import load_state
from eqat_tui import display, run_text
from eqat_tui.app import EqatApp
from eqat_tui.feed import RunView
from eqat_tui.housekeeping import what_is_in
from eqat_tui.lines import plain
from eqat_tui.measured import colour_of, newest
from eqat_tui.views import comparison, methods, monitor, result

FOREIGN = {"block_ap": "toy", "e2e_qp": "polish"}
TOY = Stage(name="toy", label="Toy method", scope="block", doing="playing")
POLISH = Stage(name="polish", label="Polish", scope="network")


def renamed(event: Any) -> Any:
    """The same event of a run whose stages are called otherwise."""
    changes: dict[str, Any] = {}
    for field in ("phase", "stage"):
        name = getattr(event, field, None)
        if name is not None:
            before, _, last = name.rpartition("evaluate_")
            changes[field] = f"{'evaluate_' if before or name != last else ''}{FOREIGN.get(last, last)}"
    if isinstance(event, events.Plan):
        phases = [renamed_phase(phase) for phase in event.plan["phases"]]
        changes["plan"] = {**event.plan, "phases": phases}
    return msgspec.structs.replace(event, **changes)


def renamed_phase(phase: dict[str, Any]) -> dict[str, Any]:
    name = phase["name"]
    for ours, foreign in FOREIGN.items():
        name = name.replace(ours, foreign)
    return {**phase, "name": name}


def foreign(name: str) -> Callable[[str], Log]:
    """The recorded log of that name with foreign stages."""

    def write(run_id: str) -> Log:
        log = RECORDED[name](run_id)
        if name == "finished":
            log.add(events.Sample(stage="fp", prompt="once", text="upon a time"))
            log.add(events.Sample(stage="e2e_qp", prompt="once", text="in a while"))
        log.events = [renamed(event) for event in log.events]
        return log

    return write


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], RunDirectory]:
    return lambda name: make_run(tmp_path / "runs", foreign(name), name=f"20251124-1600-x-w4g32-{name[:4]}")


@pytest.fixture
def registered() -> Iterator[None]:
    STAGES.register(TOY)
    STAGES.register(POLISH)
    yield
    STAGES.unregister("toy")
    STAGES.unregister("polish")


def words_on(run: RunDirectory, view: RunView, *keys: str) -> str:
    """Everything that these screens show, one after the other."""
    pictures: list[str] = []

    async def script(pilot: Pilot[Any], app: EqatApp) -> None:
        await shown(pilot)
        for key in keys:
            await press(pilot, key)
            await until(pilot, lambda: f"[{key} " in picture(app))  # noqa: B023
            if key == "4":
                await until(pilot, lambda: "1 of 1" in picture(app))
            pictures.append(picture(app))
        assert not [note for note in told(app) if "a bug" in note]

    drive(app_of(run, view), script, size=(130, 50))
    return "\n".join(pictures)


def drawn(run: RunDirectory, liveness: Any) -> str:
    return words_on(run, view_of(run, liveness), "2", "3", "4")


def replayed(run: RunDirectory) -> str:
    """The monitor at the end of a replay."""
    pictures: list[str] = []

    async def script(pilot: Pilot[Any], app: EqatApp) -> None:
        await shown(pilot)
        app.replay(run, 1e4)
        await until(pilot, lambda: "replay, at its end" in picture(app))
        await pilot.pause(1.1)
        pictures.append(picture(app))

    drive(app_of(run, view_of(run, "done")), script, size=(130, 50))
    return pictures[0]


def printed(run: RunDirectory) -> str:
    """What the commands say of the run."""
    shown_run, state = show_run(run), load_state(run)
    return "\n".join(
        [
            run_text.report(shown_run),
            run_text.samples(shown_run),
            run_text.runs_table([summarize(run)]),
            display.position(state),
            what_is_in(run, 1),
        ]
    )


def test_a_finished_run_of_unknown_stages_is_drawn_with_their_names(
    made: Callable[[str], RunDirectory],
) -> None:
    run = made("finished")
    for words in (drawn(run, "done"), replayed(run)):
        assert "evaluate_polish" in words
        assert "loss of polish" in words
    words = drawn(run, "done")
    assert "perplexity 17.44, full precision 13.76" in words
    table = [row.split() for row in map(plain, result.perplexities(load_state(run), 100))]
    assert ["toy", "19.22", "1.4×"] in [row[:3] for row in table]
    assert ["polish", "17.44", "1.27×"] in [row[:3] for row in table]
    text = printed(run)
    assert "polish" in text
    assert "in a while" in text
    assert "perplexity 17.44" in text


def test_a_running_phase_that_is_unknown_shows_the_block_it_is_at(
    made: Callable[[str], RunDirectory],
) -> None:
    run = made("running")
    view = view_of(run, "running", eta=300.0)
    assert plain(monitor.progress(view, 100)[0]).startswith("toy 3/8  block 3 of 0–5  step 17/40")
    _, rows = monitor.block_table(view, 60)
    assert "now" in plain(rows[3])
    assert "loss of block 3" in drawn(run, "running")


def test_unknown_stages_are_compared(made: Callable[[str], RunDirectory]) -> None:
    run = made("finished")
    compared = [comparison.Compared(run, letter) for letter in "AB"]
    lines = [plain(row).split() for row in comparison.differences(compared, 100)]
    assert ["polish", "17.44", "17.44"] in lines
    assert ["perplexity,", "full", "precision", "13.76", "13.76"] in lines


@pytest.mark.usefixtures("registered")
def test_a_registered_stage_is_drawn_with_its_own_label(made: Callable[[str], RunDirectory]) -> None:
    run = made("finished")
    for words in (drawn(run, "done"), replayed(run)):
        assert "evaluate Polish" in words
        assert "loss of Polish" in words
    table = [plain(row) for row in result.perplexities(load_state(run), 100)]
    assert any(row.startswith("Toy method") and "19.22" in row for row in table)
    assert "perplexity 17.44, full precision 13.76" in drawn(run, "done")
    assert "Polish" in printed(run)
    going = view_of(made("running"), "running", eta=300.0)
    assert plain(monitor.progress(going, 100)[0]).startswith("playing 3/8  block 3 of 0–5")
    assert "now" in plain(monitor.block_table(going, 60)[1][3])


def test_our_stages_keep_their_colours_and_a_further_one_gets_the_next() -> None:
    assert [colour_of(name) for name in ("fp", "rtn", "block_ap", "e2e_qp", "e2e_qat", "lr_qat")] == [
        "muted",
        "series2",
        "series3",
        "series1",
        "series4",
        "series2",
    ]
    assert colour_of("gptq") == colour_of("imported") == colour_of("block_ap")
    assert colour_of("toy") == colour_of("polish") == ""
    STAGES.register(TOY)
    STAGES.register(POLISH)
    assert colour_of("toy") == colour_of("block_ap"), "no run has both"
    network = [stage.name for stage in STAGES if stage.scope == "network"]
    colours = [colour_of(name) for name in network]
    assert colours == ["series1", "series4", "series2", "series1", "series4"][: len(colours)]
    STAGES.unregister("polish")
    STAGES.unregister("toy")


def test_the_newest_version_counts_and_an_unknown_one_for_more_than_a_baseline() -> None:
    assert newest({"fp": 1.0, "rtn": 4.0, "block_ap": 3.0, "e2e_qp": 2.0}) == 2.0
    assert newest({"fp": 1.0, "rtn": 4.0, "block_ap": 3.0, "e2e_qp": None}) == 3.0
    assert newest({"fp": 1.0, "rtn": 4.0, "toy": 3.5}) == 3.5
    assert newest({"fp": 1.0}) is None


def test_a_method_is_called_after_its_stages() -> None:
    ours = [STAGES["block_ap"], STAGES["e2e_qp"]]
    assert methods.words_of([TOY]) == "Toy method only"
    assert methods.words_of([TOY, POLISH]) == "Toy method, then Polish"
    assert methods.words_of([TOY, ours[1]]) == "Toy method, then E2E-QP"
    assert methods.words_of([*ours, POLISH]) == "Block-AP, then E2E-QP, then Polish"
    assert methods.words_of([ours[1], POLISH]) == "E2E-QP, then Polish, on rounded weights"


def test_a_real_run_of_an_extension_is_drawn_with_its_labels(tmp_path: Path) -> None:
    """From its start on, by an engine, and not only out of a log that was written by hand."""
    on = {"block_ap.enabled": False, "e2e_qp.enabled": False}
    on |= {"toy_block.enabled": True, "toy_network.enabled": True}
    with toys.registered():
        run = engine_runs.make_run(tmp_path / "runs", {**on, "grid.group_size": 32})
        assert engine_runs.run_here(run) == 0
        words = drawn(run, "done")
        assert "evaluate Toy network" in words
        assert "loss of Toy network" in words
        table = [plain(row) for row in result.perplexities(load_state(run), 100)]
        drawn_stages = [row.split("  ")[0] for row in table if row.startswith("Toy")]
        assert drawn_stages == ["Toy blocks", "Toy network"] * 2, "perplexity, then divergence"
        text = printed(run)
        assert "Toy blocks" in text
        assert "Toy network" in text
