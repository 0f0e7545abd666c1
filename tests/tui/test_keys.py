"""What keys do, and what they say when they can do nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from app_tools import StillFeed, app_of, drive, picture, press, shown, told, until, view_of, words_of
from logs import RECORDED
from textual.pilot import Pilot

from engine.run import control
from engine.run.directory import RunDirectory
from engine.run.finding import list_runs
from engine.run.lock import RunLock
from eqat_tui.app import EqatApp
from eqat_tui.feed import ReplayFeed
from eqat_tui.keys import everywhere, key_name
from eqat_tui.lines import plain
from eqat_tui.screens.base import READ_ONLY, WorkScreen
from eqat_tui.screens.dialogs import Confirm, Reader
from eqat_tui.screens.monitor import MonitorScreen
from eqat_tui.screens.runs import CompareScreen, RunsScreen
from eqat_tui.screens.table import SCREENS
from eqat_tui.widgets.chrome import KeyBar
from eqat_tui.widgets.list_panel import ListPanel
from eqat_tui.widgets.panel import ScrollPanel

Recorded = Callable[[str], RunDirectory]
Play = Pilot[Any]


def running(recorded: Recorded, **options: Any) -> tuple[RunDirectory, EqatApp]:
    run = recorded("running")
    return run, app_of(run, view_of(run, "running", eta=300.0), **options)


def test_killing_asks_first(recorded: Recorded) -> None:
    run = recorded("running")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, "K")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        await until(pilot, lambda: "Kill the engine?" in picture(app))
        await press(pilot, "n")
        assert told(app) == []

    drive(app_of(run, view_of(run, "hung")), script)


@pytest.mark.parametrize(("key", "request_"), [("x", "stop"), ("a", "abort")])
@pytest.mark.parametrize(("answer", "agreed"), [("y", 1), ("n", 0), ("enter", 0), ("escape", 0)])
def test_what_ends_a_run_asks_first_and_enter_alone_does_not_agree(
    key: str, request_: str, answer: str, agreed: int, recorded: Recorded
) -> None:
    run, app = running(recorded)

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, key)
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        await press(pilot, answer)
        await until(pilot, lambda: isinstance(app.screen, Confirm) == (answer == "enter"))

    drive(app, script)
    assert [request.request for request in control.pending(run)] == [request_] * agreed


@pytest.mark.parametrize(
    ("name", "liveness", "key", "reason"),
    [
        ("finished", "done", "x", "the run is done: no engine works on it"),
        ("finished", "done", "r", "the run is done: 3 shows its result"),
        ("running", "running", "r", "the run is running"),
        ("running", "running", "K", "the engine answers: x stops it, a aborts it"),
        ("running", "running", "f", "it does already"),
        ("stopped", "stopped", "a", "the run is stopped: no engine works on it"),
    ],
)
def test_a_key_that_can_do_nothing_says_why(
    name: str, liveness: Any, key: str, reason: str, recorded: Recorded
) -> None:
    run = recorded(name)
    app = app_of(run, view_of(run, liveness))

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, key)
        await until(pilot, lambda: told(app) == [reason])

    drive(app, script)
    assert control.pending(run) == []


def test_disabled_keys_stay_in_the_footer_in_brackets(recorded: Recorded) -> None:
    run = recorded("finished")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "(x stop)" in picture(app))
        bar = words_of(app.screen.query_one(KeyBar))
        assert "(r resume)" in bar
        assert "d detach" in bar
        assert "(d detach)" not in bar

    drive(app_of(run, view_of(run, "done")), script)


def test_a_read_only_viewer_changes_nothing(recorded: Recorded) -> None:
    run, app = running(recorded, read_only=True)

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, "x", "a", "K", "3", "e", "4")
        await until(pilot, lambda: "1 of 1" in picture(app))
        await press(pilot, "D", "r", "F", "1", "r", "w")
        await until(pilot, lambda: len(told(app)) == 9)
        assert set(told(app)) == {READ_ONLY}
        await until(pilot, lambda: "read-only" in picture(app).splitlines()[0])

    drive(app, script)
    assert control.pending(run) == []
    assert [one.id for one in list_runs(Path("runs"))] == [run.id]


def test_every_key_is_in_the_help_and_in_the_palette(recorded: Recorded) -> None:
    run = recorded("finished")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        for key in ("1", "2", "3", "4", "5", "6"):
            await press(pilot, key)
            screen = app.screen
            assert isinstance(screen, WorkScreen)
            commands = {command.title for command in app.get_system_commands(screen)}
            offered = [*screen.offered(), *(one for one in everywhere() if one.action != "palette")]
            assert {one.label for one in offered} <= commands
            await press(pilot, "question_mark")
            await until(pilot, lambda: isinstance(app.screen, Reader))
            panel = app.screen.query_one(ScrollPanel)
            await until(pilot, lambda: bool(panel.lines))  # noqa: B023
            words = " ".join(" ".join(map(plain, panel.lines)).split())
            for one in (*screen.offered(), *everywhere()):
                assert f"{one.shown} {one.label} {one.tip}" in words
            await press(pilot, "escape")
            await until(pilot, lambda: app.screen is screen)  # noqa: B023

    drive(app_of(run, view_of(run, "done")), script, size=(120, 40))


def test_no_screen_has_a_key_twice() -> None:
    from eqat_tui.screens.monitor import COMMON_KEYS, LIVE_KEYS, REPLAY_KEYS

    sets = [(*LIVE_KEYS, *COMMON_KEYS), (*REPLAY_KEYS, *COMMON_KEYS)]  # the monitor offers one of them
    screens = [row.load() for row in SCREENS]
    sets += [screen.KEYS for screen in (*screens, CompareScreen) if screen is not MonitorScreen]
    assert len(sets) == len(SCREENS.names()) + 2
    for keys in sets:
        names = [name for key in (*keys, *everywhere()) for name in key.keys.split(",")]
        assert len(names) == len(set(names))


def test_keys_are_named_as_people_write_them() -> None:
    assert [key_name(key) for key in ("ctrl+p", "question_mark", "q", "slash")] == ["^p", "?", "q", "/"]


def test_digits_go_to_every_screen_and_the_title_says_which(recorded: Recorded) -> None:
    run = recorded("finished")

    async def script(pilot: Play, app: EqatApp) -> None:
        names = ("Setup", "Monitor", "Result", "Runs", "Memory")
        for number in (5, 4, 3, 2, 1):
            await press(pilot, str(number))
            await until(pilot, lambda: f"[{number} {names[number - 1]}]" in picture(app))  # noqa: B023

    drive(app_of(run, view_of(run, "done")), script)


def test_choosing_a_block_draws_its_loss_and_f_goes_back(recorded: Recorded) -> None:
    _, app = running(recorded)

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "loss of block 3" in picture(app))
        await press(pilot, "up", "up")
        await until(pilot, lambda: "loss of block 1" in picture(app))
        await press(pilot, "c")
        await until(pilot, lambda: "loss per block" in picture(app))
        await press(pilot, "c", "c", "f")
        await until(pilot, lambda: "loss of block 3" in picture(app))
        await press(pilot, "s")
        await until(pilot, lambda: "loss of block 3 (log)" not in picture(app))

    drive(app, script)


def test_the_log_shows_everything_that_happened(recorded: Recorded) -> None:
    run = recorded("failed")
    log = run.logs_dir / "attempt-001.log"
    log.write_text("the engine's last words\x1b[31m\n")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await press(pilot, "l")
        await until(pilot, lambda: isinstance(app.screen, Reader))
        await press(pilot, "end")
        await until(pilot, lambda: "last words" in picture(app))
        assert "\x1b" not in picture(app)

    drive(app_of(run, view_of(run, "failed")), script)


def test_a_screen_that_comes_back_shows_what_is_true_now(recorded: Recorded) -> None:
    """And while it stays: headers, figures and tables are of one moment."""
    run = recorded("running")
    before = view_of(run, "running", eta=300.0)
    row = before.state.block_rows["block_ap", before.state.block or 0]

    class Moving(StillFeed):
        def goes_on(self, step: int, block: int) -> None:
            state = self._view.state
            rows = {**state.block_rows, ("block_ap", block): msgspec.structs.replace(row, index=block)}
            state = msgspec.structs.replace(
                state, block=block, step=step, block_rows=rows, event_count=state.event_count + 1
            )
            self._view = msgspec.structs.replace(self._view, state=state)

    async def script(pilot: Play, app: EqatApp) -> None:
        async def shows(*words: str) -> None:
            app.look_now()
            await until(pilot, lambda: all(word in picture(app) for word in words))

        await shown(pilot)
        await press(pilot, "3")
        feed.goes_on(18, 3)
        await shows("step 18/40", "now", "block 3 of 0–5, step 18 of 40")
        feed.goes_on(21, 4)
        await shows("block 4 of 0–5", "block 4 of 0–5, step 21 of 40")
        await press(pilot, "2")
        await shows("block 4 of 0–5", "step 21/40")
        await press(pilot, "3")
        feed.goes_on(33, 5)
        await press(pilot, "2")
        await shows("block 5 of 0–5", "step 33/40")
        await press(pilot, "3")
        await shows("block 5 of 0–5", "block 5 of 0–5, step 33 of 40")

    app = app_of(mode="monitor")
    feed = Moving(run, before)
    app.call_later(app.show_feed, feed)
    drive(app, script, size=(100, 30))


# -- replay --------------------------------------------------------------------------------------------


def test_a_finished_run_is_replayed_at_any_speed(recorded: Recorded) -> None:
    run = recorded("finished")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "finished" in picture(app))
        await press(pilot, "t")
        await until(pilot, lambda: "replay ×10" in picture(app))
        await press(pilot, "space")
        await until(pilot, lambda: "replay, held" in picture(app))
        await press(pilot, *["left"] * 20, *["right"] * 10)
        await until(pilot, lambda: "block 3 of 0–5" in picture(app) or "block 2 of 0–5" in picture(app))
        await press(pilot, "x")
        assert told(app) == []  # no key of a replay
        await press(pilot, "space", *["plus"] * 10)
        await until(pilot, lambda: "replay, at its end" in picture(app))
        await until(pilot, lambda: "finished" in picture(app))
        await until(pilot, lambda: "loss of E2E-QP" in picture(app))
        await press(pilot, "left")
        await until(pilot, lambda: "replay, held" in picture(app))
        feed = app.feed
        assert isinstance(feed, ReplayFeed)
        assert feed.speed == 10_000.0
        await press(pilot, "escape")
        await until(pilot, lambda: "took" in picture(app))

    drive(app_of(run), script)


# -- runs ----------------------------------------------------------------------------------------------


def test_runs_are_filtered_and_sorted(recorded: Recorded) -> None:
    for name in RECORDED:
        recorded(name)

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "7 of 7" in picture(app))
        await press(pilot, "slash", *"failed")
        await until(pilot, lambda: "1 of 7" in picture(app))
        await press(pilot, "enter")
        assert app.screen.focused is app.screen.query_one("#list")
        await press(pilot, "escape")
        await until(pilot, lambda: "7 of 7" in picture(app))
        await press(pilot, "o")
        await until(pilot, lambda: "runs, by state" in picture(app))
        rows = app.screen.query_one("#list", ListPanel).rows
        states = ["".join(text for text, _ in row).split("  ")[3].strip() for row in rows]
        assert states[-1] == "✓ done"

    drive(app_of(mode="runs"), script)


def test_two_marked_runs_are_compared_and_one_is_not_enough(recorded: Recorded) -> None:
    recorded("finished"), recorded("stopped")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "2 of 2" in picture(app))
        await press(pilot, "space", "equals_sign")
        await until(pilot, lambda: told(app) == ["mark two or more runs with space first"])
        await press(pilot, "space", "equals_sign")
        await until(pilot, lambda: isinstance(app.screen, CompareScreen))
        await until(pilot, lambda: "perplexity" in picture(app))
        await press(pilot, "escape")
        await until(pilot, lambda: isinstance(app.screen, RunsScreen))

    drive(app_of(mode="runs"), script)


@pytest.mark.parametrize("answer", ["y", "n"])
def test_deleting_asks_and_does_it(answer: str, recorded: Recorded) -> None:
    run = recorded("finished")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "1 of 1" in picture(app))
        await press(pilot, "delete")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        await press(pilot, answer)
        if answer == "y":
            await until(pilot, lambda: "No runs in" in picture(app))

    drive(app_of(mode="runs"), script)
    assert run.path.exists() == (answer == "n")


def test_the_question_before_deleting_names_the_path_and_what_is_in_it(recorded: Recorded) -> None:
    run = recorded("finished")
    (run.export_dir / "gptq_v2").mkdir()

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "1 of 1" in picture(app))
        await press(pilot, "delete")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        await until(pilot, lambda: "export gptq_v2, " in picture(app))
        assert str(run.path) in "".join(line.strip(" │") for line in picture(app).splitlines())
        assert "done, perplexity" in picture(app)
        await press(pilot, "n")

    drive(app_of(mode="runs"), script)


@pytest.mark.parametrize("spoilt_by", ["link", "file"])
def test_what_is_no_run_or_a_link_to_one_is_not_deleted_and_the_reason_is_shown(
    spoilt_by: str, recorded: Recorded, tmp_path: Path
) -> None:
    run = recorded("finished")
    said = "notes.txt"
    if spoilt_by == "link":
        moved = run.path.rename(tmp_path / "moved")
        run.path.symlink_to(moved)
        said = "is a link to"
    else:
        (run.path / "notes.txt").write_text("precious")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "1 of 1" in picture(app))
        await press(pilot, "delete")
        await until(pilot, lambda: any(said in words for words in told(app)))
        assert not isinstance(app.screen, Confirm)

    drive(app_of(mode="runs"), script)
    assert run.config_toml.exists()


def test_a_run_that_an_engine_works_on_is_not_deleted(recorded: Recorded) -> None:
    run = recorded("running")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "running Block-AP" in picture(app))
        await press(pilot, "delete")
        await until(pilot, lambda: told(app) == ["an engine works on it: open it and stop it first"])

    with RunLock(run.lock_path):
        drive(app_of(mode="runs"), script)


def test_the_monitor_screen_without_a_run_says_where_to_go() -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "There is no run in runs yet: 1 sets one up" in picture(app))
        await press(pilot, "x")
        await until(pilot, lambda: told(app) == ["there is no run yet: 1 sets one up"])
        assert isinstance(app.screen, MonitorScreen)

    drive(app_of(mode="monitor"), script)


@pytest.mark.parametrize(("name", "longer"), [("stopped", True), ("finished", False)])
@pytest.mark.parametrize("answer", ["y", "n"])
def test_freeing_asks_and_names_what_goes_and_how_many_bytes(
    name: str, longer: bool, answer: str, recorded: Recorded
) -> None:
    run = recorded(name)
    stored = run.cache_dir / "streams-003-full.raw"
    stored.write_bytes(b"x" * 3000)

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "1 of 1" in picture(app))
        await press(pilot, "g", "G")  # top and bottom of the list, and nothing else
        assert not isinstance(app.screen, Confirm)
        await press(pilot, "F")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        words = " ".join(picture(app).replace("│", " ").split())
        assert f"Free 2.93 KiB of {run.id}?" in words
        assert "deletes: stored activations (2.93 KiB)" in words
        assert ("Going on will take longer" in words) == longer
        assert stored.exists()
        await press(pilot, answer)
        if answer == "y":
            await until(pilot, lambda: told(app) == [f"freed 2.93 KiB of {run.id}"])

    drive(app_of(mode="runs"), script)
    assert stored.exists() == (answer == "n")


def test_a_run_that_holds_nothing_to_free_says_so(recorded: Recorded) -> None:
    run = recorded("finished")

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "1 of 1" in picture(app))
        await press(pilot, "F")
        await until(pilot, lambda: told(app) == [f"{run.id} holds nothing that it could make again"])

    drive(app_of(mode="runs"), script)


def test_what_other_screens_can_do_is_found_in_the_palette_too() -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        await press(pilot, "ctrl+p", *"delete")
        await until(pilot, lambda: "delete (Runs: del)" in picture(app))
        await press(pilot, "enter")
        await until(pilot, lambda: "[4 Runs]" in picture(app))

    drive(app_of(mode="setup"), script)


@pytest.mark.parametrize("kept", [True, False])
def test_of_an_abort_it_is_said_from_where_the_run_goes_on(kept: bool, recorded: Recorded) -> None:
    run = recorded("running")
    works, over = view_of(run, "running"), view_of(run, "aborted")
    if not kept:
        over = msgspec.structs.replace(over, state=msgspec.structs.replace(over.state, checkpoint=None))

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        app.feed._view = over  # type: ignore[union-attr]
        app.look_now()
        await until(pilot, lambda: bool(told(app)))
        goes_on = "goes on from the last checkpoint" if kept else "begins anew"
        assert told(app)[-1] == f"aborted: r {goes_on}"

    drive(app_of(run, works), script)
