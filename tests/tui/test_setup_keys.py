"""What keys do where a run is set up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from app_tools import app_of, asked, drive, picture, press, told, until
from textual.pilot import Pilot
from waiting import PATIENCE

from engine.plan import plan as planning
from engine.run.directory import RunDirectory
from eqat_tui.app import EqatApp
from eqat_tui.screens.dialogs import Ask, Confirm
from eqat_tui.screens.pickers import ModelPicker, PresetPicker
from eqat_tui.screens.setup import SetupScreen

Recorded = Callable[[str], RunDirectory]
Play = Pilot[Any]


def setup_of(app: EqatApp) -> SetupScreen:
    screen = app.screen
    assert isinstance(screen, SetupScreen)
    return screen


def test_settings_are_changed_found_and_reset_by_keys_alone() -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        screen = setup_of(app)
        screen.start_from("smoke")
        await press(pilot, "down", "down", "down", "left")
        await until(pilot, lambda: screen.draft.changes == {"grid.bits": 3})
        await press(pilot, "down", "right")
        await until(pilot, lambda: screen.draft.changes == {"grid.bits": 3, "grid.group_size": 64})
        await until(pilot, lambda: "eqat run smoke --bits 3 --group-size 64" in picture(app))
        await press(pilot, "slash", *"epochs", "enter")
        await until(pilot, lambda: "block_ap.epochs" in picture(app))
        await press(pilot, "enter")
        (await asked(pilot, Ask)).value = "5"
        await press(pilot, "enter")
        await until(pilot, lambda: screen.draft.changes.get("block_ap.epochs") == "5")
        await press(pilot, "backspace", "escape")
        await until(pilot, lambda: "block_ap.epochs" not in screen.draft.changes)
        await until(pilot, lambda: "ready: r" in picture(app))

    drive(app_of(mode="setup"), script)


def test_an_impossible_choice_is_explained_where_it_is_made_and_nothing_starts() -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        screen = setup_of(app)
        screen.start_from("smoke")
        await press(pilot, "down", "down", "down", "down", "right", "right")  # groups of 128, rows of 64
        await until(pilot, lambda: "not ready" in picture(app))
        await until(pilot, lambda: "✗" in picture(app))
        await press(pilot, "r")
        await until(pilot, lambda: bool(told(app)))
        assert "128" in told(app)[-1]

    drive(app_of(mode="setup"), script)
    assert not Path("runs").exists()


def test_a_plan_of_earlier_settings_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the new plan is being made the last one still shows, but it says nothing about these settings."""
    may_plan, real = threading.Event(), planning.make_plan

    def slow(*args: Any, **kwargs: Any) -> Any:
        may_plan.wait(PATIENCE)
        return real(*args, **kwargs)

    async def script(pilot: Play, app: EqatApp) -> None:
        setup_of(app).start_from("smoke")
        await until(pilot, lambda: "eqat run smoke" in picture(app) and "ready: r" in picture(app))
        monkeypatch.setattr(planning, "make_plan", slow)
        await press(pilot, "down", "down", "down", "left", "r")
        await until(pilot, lambda: bool(told(app)))
        assert "ready: r" not in picture(app)
        assert "planning" in picture(app)
        assert "not ready yet" in told(app)[-1]
        may_plan.set()
        await until(pilot, lambda: "ready: r" in picture(app))

    drive(app_of(mode="setup"), script)
    assert not Path("runs").exists()


def test_a_value_of_the_wrong_kind_is_refused_in_words() -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        screen = setup_of(app)
        screen.start_from("smoke")
        await press(pilot, "slash", *"weight_decay", "enter", "enter")
        box = await asked(pilot, Ask)
        box.value = "much"
        await press(pilot, "enter")
        await until(pilot, lambda: "cannot be 'much'" in picture(app))
        assert box.value == "much"  # to be put right
        await press(pilot, "escape")
        await until(pilot, lambda: app.screen is screen)
        assert screen.draft.changes == {}

    drive(app_of(mode="setup"), script)


def test_settings_are_saved_as_a_file_that_runs() -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        setup_of(app).start_from("smoke")
        await press(pilot, "down", "down", "down", "left", "w")
        (await asked(pilot, Ask)).value = "mine.toml"
        await press(pilot, "enter")
        await until(pilot, lambda: Path("mine.toml").exists())

    drive(app_of(mode="setup"), script)
    from engine.config.loading import load

    assert load("mine.toml").grid.bits == 3


def test_a_preset_keeps_what_was_changed() -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        screen = setup_of(app)
        screen.start_from("smoke")
        await press(pilot, "down", "down", "down", "left", "up", "up", "enter")
        await asked(pilot, PresetPicker)
        for letter in "demo-w2":
            await press(pilot, "minus" if letter == "-" else letter)
        await press(pilot, "enter")
        await until(pilot, lambda: screen.draft.base == "demo-w2")
        assert screen.draft.changes == {"grid.bits": 3}
        await press(pilot, "enter")
        await asked(pilot, PresetPicker)
        await press(pilot, *"smo")  # the description of the demo has these letters too
        await press(pilot, "enter")
        await until(pilot, lambda: screen.draft.base == "smoke")

    drive(app_of(mode="setup"), script)


def test_a_model_is_found_by_typing_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "small"
    folder.mkdir(parents=True)
    from engine.architecture.description import TINY_LLAMA

    folder.joinpath("config.json").write_bytes(msgspec.json.encode(TINY_LLAMA))

    async def script(pilot: Play, app: EqatApp) -> None:
        screen = setup_of(app)
        screen.start_from("smoke")
        await press(pilot, "enter")
        (await asked(pilot, ModelPicker)).value = f"{tmp_path}/mod"
        await until(pilot, lambda: "models/" in picture(app))
        await press(pilot, "tab", *"sm")
        await until(pilot, lambda: "supported" in picture(app))
        await press(pilot, "enter")
        await until(pilot, lambda: screen.draft.changes.get("model.source") == str(folder))

    drive(app_of(mode="setup"), script)


def test_enter_on_a_choice_lists_what_there_is_and_letters_typed_there_do_nothing_else() -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        screen = setup_of(app)
        screen.start_from("smoke")
        await press(pilot, "down", "down", "down", "enter")
        await until(pilot, lambda: "grid.bits" in picture(app))
        await press(pilot, *"3ra", "up", "enter")
        await until(pilot, lambda: screen.draft.changes == {"grid.bits": 3})
        await until(pilot, lambda: app.screen is screen)
        await press(pilot, "R")  # one change is soon made again
        await until(pilot, lambda: screen.draft.changes == {})
        await press(pilot, "left", "down", "right", "R")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        assert len(screen.draft.changes) == 2
        await press(pilot, "y")
        await until(pilot, lambda: screen.draft.changes == {})

    drive(app_of(mode="setup"), script)
    assert not Path("runs").exists()
