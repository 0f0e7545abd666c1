"""The result screen by keys: all of it can be reached, and it starts and stops only what is its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from app_tools import app_of, drive, picture, press, shown, until, view_of
from test_keys import told
from textual.pilot import Pilot

from engine.config.formats import FORMATS
from engine.run import control
from engine.run.directory import RunDirectory
from engine.run.liveness import Work
from engine.run.state import RunState
from eqat_tui.app import EqatApp

Recorded = Callable[[str], RunDirectory]
Play = Pilot[Any]


@pytest.mark.parametrize("size", [(80, 24), (60, 20)])
def test_what_lies_below_the_screen_is_reached_by_keys(size: tuple[int, int], recorded: Recorded) -> None:
    run = recorded("finished")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        assert "from_pretrained" not in picture(app)
        await press(pilot, "end")
        await until(pilot, lambda: "AutoTokenizer.from_pretrained(path)" in picture(app))
        await press(pilot, "home")
        await until(pilot, lambda: "quality" in picture(app))
        before = picture(app)
        await press(pilot, "down")
        await until(pilot, lambda: picture(app) != before)

    drive(app_of(run, view_of(run, "done"), mode="result"), script, size=size)


def test_the_result_stops_what_it_started_and_not_the_training(recorded: Recorded) -> None:
    run = recorded("running")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, "x")
        assert told(app) == ["the run itself is at work: x on 2 stops it"]

    drive(app_of(run, view_of(run, "running"), mode="result"), script)
    assert control.pending(run) == []


def test_an_evaluation_at_work_is_not_called_dead(recorded: Recorded) -> None:
    run = recorded("finished")
    view = view_of(run, "done", job=Work("eval", 2, "running"))
    begun = msgspec.structs.replace(view.state, job=RunState(task="eval", attempt=2))
    view = msgspec.structs.replace(view, state=begun)

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        assert "evaluation" in picture(app)
        assert "died" not in picture(app)

    drive(app_of(run, view, mode="result"), script, size=(80, 60))


@pytest.mark.parametrize(
    ("name", "state", "named"), [("running", "running", False), ("finished", "done", True)]
)
def test_keys_that_can_do_nothing_yet_are_not_proposed(
    name: str, state: Any, named: bool, recorded: Recorded
) -> None:
    run = recorded(name)
    view = view_of(run, state)
    bare = msgspec.structs.replace(view.state, exports={}, samples={})
    view = msgspec.structs.replace(view, state=bare)

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        assert "no sample yet" in picture(app)
        assert "no packed checkpoint yet" in picture(app)
        assert ("i lets both models" in picture(app)) == named
        assert ("e writes one" in picture(app)) == named

    drive(app_of(run, view, mode="result"), script, size=(80, 60))


def test_a_folder_that_is_taken_is_said_in_the_dialog(recorded: Recorded, tmp_path: Path) -> None:
    run = recorded("finished")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, "e", "tab", *"taken", "enter")
        await until(pilot, lambda: "not an empty folder" in picture(app))
        await press(pilot, *["backspace"] * 5, *"/proc/x", "enter")
        await until(pilot, lambda: "cannot be made in" in picture(app))
        await press(pilot, "escape")

    drive(app_of(run, view_of(run, "done"), mode="result"), script)
    assert not run.launch_path.exists()


def test_of_several_exports_each_has_its_card_and_its_lines(recorded: Recorded) -> None:
    run = recorded("finished")
    view = view_of(run, "done")
    (export,) = view.state.exports.values()
    other = msgspec.structs.replace(export, format="onnx", path="export/onnx")
    state = msgspec.structs.replace(view.state, exports={**view.state.exports, "onnx": other})
    view = msgspec.structs.replace(view, state=state)
    for name, path in (("first", export.path), ("second", other.path)):
        (run.path / path).mkdir(parents=True, exist_ok=True)
        (run.path / path / "README.md").write_text(f"---\ntags:\n---\n\n# the {name} card\n")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, "m")
        await until(pilot, lambda: "the first card" in picture(app))
        assert "1 of 2: " in picture(app)
        await press(pilot, "right")
        await until(pilot, lambda: "the second card" in picture(app) and "2 of 2: " in picture(app))
        await press(pilot, "right")
        await until(pilot, lambda: "the first card" in picture(app))
        await press(pilot, "escape", "y")
        assert "# gptq_v2\n" in app.clipboard
        assert "from_pretrained" in app.clipboard
        assert app.clipboard.index("# onnx\n") < app.clipboard.index("InferenceSession")

    drive(app_of(run, view, mode="result"), script)


def test_a_format_whose_packages_are_missing_is_no_choice_and_says_what_it_needs(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.config.formats.find_spec", lambda name: None)
    run = recorded("finished")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, "e")
        await until(pilot, lambda: "onnx  needs onnx, onnxscript, onnxruntime, not installed" in picture(app))
        await press(pilot, "end", "space")
        assert told(app) == ["onnx needs onnx, onnxscript, onnxruntime, not installed here"]

    drive(app_of(run, view_of(run, "done"), mode="result"), script)


def test_the_dialog_says_which_formats_do_not_hold_the_grid(recorded: Recorded) -> None:
    run = recorded("finished")
    config = view_of(run, "done").config
    assert config is not None
    view = view_of(run, "done", config={**config, "grid": {**config["grid"], "bits": 3}})

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, "e")
        await until(pilot, lambda: "awq  cannot hold 3 bits" in picture(app))
        assert "[x] gptq_v2" in picture(app)
        await press(pilot, "down", "space")
        await until(pilot, lambda: "[x] compressed-tensors" in picture(app))
        await press(pilot, *["down"] * (FORMATS.names().index("awq") - 1), "space")
        assert told(app) == ["awq cannot hold 3 bits"]
        await press(pilot, "escape")

    drive(app_of(run, view, mode="result"), script)


def test_where_the_directory_is_gone_nothing_is_started_in_it(recorded: Recorded) -> None:
    run = recorded("finished")
    view = view_of(run, "gone", problem="the run's directory is gone")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        for count, key in enumerate("ievt", 1):
            await press(pilot, key)
            await until(pilot, lambda count=count: len(told(app)) == count)  # type: ignore[misc]
        assert set(told(app)) == {"the run's directory is gone"}

    drive(app_of(run, view, mode="result"), script)
    assert not run.launch_path.exists()


def test_the_report_and_its_charts_are_written_where_the_app_was_started(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded("finished")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, "W")
        await until(pilot, lambda: any("charts in" in said for said in told(app)))

    drive(app_of(run, view_of(run, "done"), mode="result"), script)
    assert sorted(path.name for path in here.iterdir()) == [f"{run.id}-charts", f"{run.id}.html"]
    assert (here / f"{run.id}-charts" / "size-of-the-weights.svg").exists()
