"""What nobody arranges: other people's deletions, terminals of another size, a screen that comes late."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from app_tools import StillFeed, app_of, drive, picture, press, shown, until, view_of
from test_keys import told
from textual.events import Key
from textual.pilot import Pilot
from textual.widgets import Input

from engine.errors import UsageError
from engine.run.directory import RunDirectory
from engine.run.finding import list_runs
from eqat_tui.app import EqatApp
from eqat_tui.lines import width_of
from eqat_tui.screens.dialogs import Reader
from eqat_tui.screens.monitor import MonitorScreen
from eqat_tui.widgets.panel import ScrollPanel
from eqat_tui.words import error_for_app

Recorded = Callable[[str], RunDirectory]
Play = Pilot[Any]


def test_a_run_that_was_read_before_its_screen_stood_is_shown(recorded: Recorded) -> None:
    """The files of a finished run are read once: a screen that missed it would stay empty for ever."""
    run = recorded("finished")
    app = app_of(mode="monitor")
    app.view = view_of(run, "done")
    app.feed = StillFeed(run, app.view)

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "tiny-llama" in picture(app) and "finished" in picture(app))

    drive(app, script)


@pytest.mark.parametrize("key", ["enter", "r", "t", "n", "D", "F"])
def test_a_run_that_somebody_else_deletes_meanwhile_is_an_error_in_words(
    key: str, recorded: Recorded
) -> None:
    run = recorded("stopped")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "stopped" in picture(app))
        shutil.rmtree(run.path)
        await press(pilot, key)
        await until(pilot, lambda: bool(told(app)))
        assert run.id in told(app)[0]
        assert "a bug" not in told(app)[0]

    drive(app_of(mode="runs"), script)


def test_errors_speak_of_keys_and_not_of_flags() -> None:
    error = UsageError("cannot be written", where="runs/x", hint="choose another place with --runs-dir")
    assert error_for_app(error) == "runs/x: cannot be written"
    error = UsageError("is too small", where="grid.bits", hint="choose 2")
    assert error_for_app(error) == "grid.bits: is too small (choose 2)"


@pytest.mark.parametrize("mode", ["setup", "monitor", "result", "runs", "memory"])
def test_the_help_fits_every_terminal_and_every_resize(mode: str, recorded: Recorded) -> None:
    """No word of it is cut off, with or without a scroll bar beside it."""
    run = recorded("stopped")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: f"{mode.title()}]" in picture(app))
        await press(pilot, "question_mark")
        await until(pilot, lambda: isinstance(app.screen, Reader))
        for width, height in ((80, 24), (60, 20), (200, 50), (100, 30)):
            await pilot.resize_terminal(width, height)
            text = app.screen.query_one(ScrollPanel)

            def fits(text: ScrollPanel = text, width: int = width) -> bool:
                longest = max(map(width_of, text.lines), default=0)
                return 0 < longest <= text.size.width <= width and text.size.width - longest < 40

            await until(pilot, fits)
        assert "Leave the app; runs go on" in "\n".join(
            "".join(part for part, _ in row) for row in app.screen.query_one(ScrollPanel).lines
        )

    drive(app_of(run, view_of(run, "stopped"), mode=mode), script)


def test_the_number_of_the_screen_one_is_on_leaves_what_lies_over_it(recorded: Recorded) -> None:
    recorded("stopped")
    recorded("finished")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "2 of 2" in picture(app))
        await press(pilot, "space", "space", "equals_sign")
        await until(pilot, lambda: "2 runs" in picture(app))
        await press(pilot, "5")
        await until(pilot, lambda: "[5 Memory]" in picture(app))
        await press(pilot, "4")
        await until(pilot, lambda: "2 runs" in picture(app))
        await press(pilot, "4")
        await until(pilot, lambda: "2 of 2" in picture(app))

    drive(app_of(mode="runs"), script)


@pytest.mark.parametrize(("mode", "words"), [("setup", "lr_weight"), ("runs", "rapture")])
def test_letters_that_arrive_with_the_slash_are_searched_for_and_do_nothing_else(
    mode: str, words: str, recorded: Recorded
) -> None:
    """Over a slow connection they come in one packet, before the input can have the focus."""
    recorded("stopped")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "ready: r" in picture(app) or "1 of 1" in picture(app))
        for letter in f"/{words}":
            app.post_message(Key({"/": "slash", "_": "underscore"}.get(letter, letter), letter))
        await until(pilot, lambda: isinstance(app.focused, Input) and app.focused.value == words)
        assert told(app) == []

    drive(app_of(mode=mode), script)
    assert len(list_runs(Path("runs"))) == 1
    assert not list(Path("runs").glob("*/launch.json"))


def test_a_chosen_block_stays_chosen_when_another_screen_was_in_front(recorded: Recorded) -> None:
    run = recorded("running")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, "b", "up")
        await until(pilot, lambda: "loss of block 2" in picture(app))
        await press(pilot, "5")
        await until(pilot, lambda: "[5 Memory]" in picture(app))
        await press(pilot, "2")
        await until(pilot, lambda: isinstance(app.screen, MonitorScreen))
        await until(pilot, lambda: "loss of block 2" in picture(app))

    drive(app_of(run, view_of(run, "running", eta=300.0)), script)
