"""Screens are a table: whoever adds a row has a tab, a key, a command and a help."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from app_tools import app_of, drive, picture, press, told, until
from textual.pilot import Pilot
from textual.widget import Widget

from eqat_tui.app import EqatApp
from eqat_tui.keys import Key, bindings
from eqat_tui.screens.base import WorkScreen
from eqat_tui.screens.table import SCREENS, ScreenRow
from eqat_tui.widgets.panel import Panel


class ToyScreen(WorkScreen):
    """A screen of somebody else's package."""

    KEYS = (Key("w", "wave", "wave", "Say hello"),)
    ABOUT = "A toy."
    BINDINGS = bindings(KEYS)

    def body(self) -> Iterable[Widget]:
        yield Panel(id="toy", classes="section", title="toys")

    def do_wave(self) -> None:
        self.notify(f"hello from {self.eqat.runs_dir}")


@pytest.fixture
def toy() -> Iterator[ScreenRow]:
    row = ScreenRow(name="toy", key="7", label="Toy", tip="Play", code=f"{__name__}:ToyScreen")
    SCREENS.register(row)
    yield row
    SCREENS.unregister("toy")


def test_a_screen_is_one_row_and_one_file(toy: ScreenRow) -> None:
    async def script(pilot: Pilot[Any], app: EqatApp) -> None:
        await until(pilot, lambda: " 7 Toy " in picture(app))
        commands = {command.title: command.help for command in app.get_system_commands(app.screen)}
        assert commands["Toy"] == "Play"
        assert commands["wave (Toy: w)"] == "Go to Toy. Say hello"
        await press(pilot, "7")
        await until(pilot, lambda: "[7 Toy]" in picture(app) and "toys" in picture(app))
        await press(pilot, "w")
        assert told(app) == ["hello from runs"]
        await press(pilot, "question_mark")
        await until(pilot, lambda: "7  Toy           Play" in picture(app) and "Say hello" in picture(app))
        await press(pilot, "escape", "4")
        await until(pilot, lambda: "[4 Runs]" in picture(app))
        await pilot.click("#top-bar", offset=(picture(app).splitlines()[0].index("7 Toy"), 0))
        await until(pilot, lambda: "[7 Toy]" in picture(app))

    drive(app_of(mode="memory"), script, size=(100, 30))


def test_every_row_names_a_screen_and_no_two_have_a_key_in_common() -> None:
    assert all(issubclass(row.load(), WorkScreen) for row in SCREENS)
    assert len({row.key for row in SCREENS}) == len(SCREENS.names())
