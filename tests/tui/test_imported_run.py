"""A run of imported blocks in the app: it is listed and opens like any other, full precision or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from app_tools import app_of, drive, picture, press, shown, until, view_of
from textual.pilot import Pilot

from engine.config.loading import load
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from eqat_tui.app import EqatApp
from eqat_tui.models import known_models

Play = Pilot[Any]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    settings = {"model.source": "/models/theirs-awq", "imported.enabled": True, "block_ap.enabled": False}
    made = RunDirectory.create(
        tmp_path / "runs", load("smoke", overrides={**settings, "e2e_qp.enabled": False})
    )
    story: list[events.Event] = [
        events.RunStarted(id=made.id, pid=1, host="here", device="cpu", versions={}, argv=["engine"]),
        events.PhaseStarted(phase="imported", index=0, phases=3),
        events.BlockStarted(phase="imported", block=0, blocks=1),
        events.BlockFinished(phase="imported", block=0, seconds=1.0),
        events.PhaseFinished(phase="imported", seconds=1.0, peak_host_bytes=2**30),
        events.Eval(
            stage="imported", perplexity=23.67, tokens=9, sequence_length=9, seconds=1.0, corpus="builtin"
        ),
        events.RunFinished(outcome="done", exit_code=0, seconds=5.5),
    ]
    with EventWriter(made.events_path, 1) as writer:
        for event in story:
            writer.emit(event)
    return made


def test_its_result_shows_what_was_imported(run: RunDirectory) -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await until(pilot, lambda: "as imported" in picture(app))
        assert "23.67" in picture(app)
        await press(pilot, "2")
        await until(pilot, lambda: "import" in picture(app))

    drive(app_of(run, view_of(run, "done"), mode="result"), script)


def test_it_is_in_the_list_of_runs_and_opens(run: RunDirectory) -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "1 of 1" in picture(app))
        assert "theirs-awq" in picture(app)
        assert "23.67" in picture(app)
        await press(pilot, "enter")
        await until(pilot, lambda: "as imported" in picture(app))

    drive(app_of(mode="runs", runs_dir=run.path.parent), script)


def test_what_it_was_made_of_is_not_offered_as_a_model_to_quantize(run: RunDirectory) -> None:
    def offered() -> list[str]:
        return [one.source for one in known_models(run.path.parent) if one.origin == "recent"]

    assert offered() == []
    settings = {"model.source": "/models/theirs-awq", "imported.enabled": True, "block_ap.enabled": False}
    config = load("smoke", overrides={**settings, "imported.reference": "/models/fp"})
    RunDirectory.create(run.path.parent, config)
    assert offered() == ["/models/fp"]
