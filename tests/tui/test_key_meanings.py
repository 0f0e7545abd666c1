"""A key means one thing in the whole app, every key of a burst counts, and what ends a run asks first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from app_tools import app_of, drive, picture, press, settled, shown, told, until, view_of
from logs import RECORDED
from textual.events import Key
from textual.pilot import Pilot
from textual.widget import Widget

from engine.run.directory import RunDirectory
from eqat_tui.app import EqatApp
from eqat_tui.keys import everywhere
from eqat_tui.lines import line
from eqat_tui.screens.dialogs import Confirm, MarkdownReader, Reader
from eqat_tui.screens.pickers import PresetPicker
from eqat_tui.screens.runs import CompareScreen
from eqat_tui.screens.setup import SetupScreen
from eqat_tui.screens.table import SCREENS
from eqat_tui.views import setup as setup_views
from eqat_tui.widgets.list_panel import ListPanel

Recorded = Callable[[str], RunDirectory]
Play = Pilot[Any]

MOVING = set("gGjk")
"""Top, bottom, down and up wherever something scrolls or is chosen from."""
SAME_THING = {"run": "resume"}
"""Both start an engine."""


def all_keys() -> list[tuple[str, str]]:
    """Every letter and sign that a screen hears, and what it does there."""
    screens = [*(row.load() for row in SCREENS), CompareScreen]
    keys = [key for screen in screens for key in screen.KEYS] + list(everywhere())
    return [(name, SAME_THING.get(key.action, key.action)) for key in keys for name in key.keys.split(",")]


def test_a_letter_means_one_thing_on_all_screens() -> None:
    meanings: dict[str, set[str]] = {}
    for name, action in all_keys():
        if len(name) == 1:
            meanings.setdefault(name, set()).add(action)
    assert {name: found for name, found in meanings.items() if len(found) > 1} == {}
    assert not MOVING & set(meanings)
    assert len(meanings) > 20


def burst(app: EqatApp, letter: str, count: int = 30) -> None:
    """So many keys in one packet, as they arrive over a slow connection."""
    for _ in range(count):
        app.post_message(Key(letter, letter))


def scrolled(app: EqatApp, where: str) -> int:
    return round(app.screen.query_one(where, Widget).scroll_offset.y)


def test_every_key_of_a_burst_scrolls_and_g_and_G_are_top_and_bottom(recorded: Recorded) -> None:
    run = recorded("finished")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        texts = [
            Reader("a text", lambda width: [line(f"line {index}") for index in range(200)]),
            MarkdownReader([("a card", "\n\n".join(f"line {index}" for index in range(100)))]),
        ]
        for text in texts:
            app.push_screen(text)
            await until(pilot, lambda: "line 5" in picture(app))
            await settled(pilot)
            burst(app, "j")
            await until(pilot, lambda: scrolled(app, "#text") == 30)
            burst(app, "k", 12)
            await until(pilot, lambda: scrolled(app, "#text") == 18)
            await press(pilot, "G")
            await until(pilot, lambda: "line 199" in picture(app) or "line 99" in picture(app))
            await press(pilot, "g")
            await until(pilot, lambda: scrolled(app, "#text") == 0)
            await press(pilot, "escape")
        await press(pilot, "3")
        await settled(pilot)
        burst(app, "j", 5)
        await until(pilot, lambda: scrolled(app, "#columns") == 5)
        await press(pilot, "G")
        await until(pilot, lambda: "AutoTokenizer" in picture(app))
        await press(pilot, "g")
        await until(pilot, lambda: scrolled(app, "#columns") == 0)

    drive(app_of(run, view_of(run, "done")), script)


def test_every_key_of_a_burst_moves_in_a_list(recorded: Recorded) -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        form = app.screen.query_one("#form", ListPanel)
        await until(pilot, lambda: len(form.rows) > 10)
        await press(pilot, "G")
        assert form.cursor == len(form.rows) - 1
        await press(pilot, "g")
        assert form.cursor == 0
        await press(pilot, "G", "right")  # the last section
        await until(pilot, lambda: len(form.rows) > 20)
        await press(pilot, "g")
        burst(app, "j", 20)
        await until(pilot, lambda: form.cursor == 20)
        assert form.scroll_offset.y <= 20 < form.scroll_offset.y + form.size.height
        burst(app, "k", 7)
        await until(pilot, lambda: form.cursor == 13)

    drive(app_of(mode="setup"), script)


def test_a_pickers_list_has_its_ends_while_one_types() -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        app.push_screen(PresetPicker("demo"))
        await until(pilot, lambda: "Start from a preset" in picture(app))
        names = app.screen.query_one("#list", ListPanel)
        await press(pilot, "end")
        assert names.cursor == len(names.rows) - 1
        await press(pilot, "home")
        assert names.cursor == 0
        await press(pilot, "tab", "G")
        assert names.cursor == len(names.rows) - 1

    drive(app_of(mode="setup"), script)


@pytest.mark.parametrize("key", ["right", "enter"])
def test_what_is_unfolded_at_the_lower_edge_is_in_view(key: str) -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        screen = app.screen
        assert isinstance(screen, SetupScreen)
        form = screen.query_one("#form", ListPanel)
        await until(pilot, lambda: len(form.rows) > 10)
        await press(pilot, "G", key)
        section = screen._rows[form.cursor]
        fields = setup_views.section_fields(section.name)
        assert len(fields) > 3
        rows = await settled(pilot)
        assert section.label in rows
        assert fields[0].partition(".")[2] in rows
        below = form.size.height - (form.cursor - form.scroll_offset.y) - 1
        assert below == min(len(fields), form.size.height - 1)

    drive(app_of(mode="setup"), script)


def test_changed_settings_are_not_replaced_without_a_question(recorded: Recorded) -> None:
    recorded("finished")

    async def script(pilot: Play, app: EqatApp) -> None:
        screen = app.screen
        assert isinstance(screen, SetupScreen)
        await press(pilot, "down", "down", "down", "left", "down", "right")
        changes = dict(screen.draft.changes)
        assert len(changes) == 2
        for answer in ("n", "y"):
            await press(pilot, "4")
            await until(pilot, lambda: "1 of 1" in picture(app))
            await press(pilot, "n")
            await until(pilot, lambda: isinstance(app.screen, Confirm))
            assert "2 settings that were changed" in picture(app)
            await press(pilot, answer)
            await until(pilot, lambda: app.screen is screen)
            assert (screen.draft.changes == changes) == (answer == "n")

    drive(app_of(mode="setup"), script)


def test_a_note_covers_nothing_of_the_screen(recorded: Recorded) -> None:
    run = recorded("stopped")

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        before = await settled(pilot)
        journal = before.splitlines()[-4:-1]
        assert "stopped (exit code 75)" in journal[-1]
        await press(pilot, "x")
        await until(pilot, lambda: bool(told(app)) and told(app)[0] in picture(app))
        rows = (await settled(pilot)).splitlines()
        at = next(index for index, row in enumerate(rows) if "stopped (exit code 75)" in row)
        assert [row[:60].rstrip() for row in rows[at - 2 : at + 1]] == [row[:60].rstrip() for row in journal]
        assert rows[-1] == before.splitlines()[-1]

    drive(app_of(run, view_of(run, "stopped")), script, notes=True)


# -- where no run was named ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["2", "3"])
@pytest.mark.parametrize("held", [True, False])
def test_the_run_that_works_is_meant_else_the_newest(
    key: str, held: bool, recorded: Recorded, tmp_path: Path
) -> None:
    from engine.run.lock import RunLock

    older, newer = recorded("running"), recorded("finished")
    older.path.rename(older.path.with_name("20250101-1600-old-0001"))
    older = RunDirectory(older.path.with_name("20250101-1600-old-0001"))
    lock = RunLock(older.lock_path)
    if held:
        lock.acquire()

    async def script(pilot: Play, app: EqatApp) -> None:
        await press(pilot, key)
        await until(pilot, lambda: app.view is not None)
        assert app.current().id == (older.id if held else newer.id)
        await shown(pilot)
        screen = app.screen
        await until(pilot, lambda: screen.focused is not None)

    try:
        drive(app_of(mode="setup", runs_dir=tmp_path / "runs"), script)
    finally:
        lock.release()


@pytest.mark.parametrize("mode", ["monitor", "result"])
def test_without_any_run_there_is_one_sentence_and_no_empty_frame(mode: str) -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: "There is no run in runs yet: 1 sets one up." in picture(app))
        rows = (await settled(pilot)).splitlines()
        assert [row for row in rows[2:-1] if row.strip()] == []

    drive(app_of(mode=mode), script)


# -- blocks --------------------------------------------------------------------------------------------


def test_a_block_has_one_number_wherever_a_person_reads_it(recorded: Recorded) -> None:
    from engine.run.lock import RunLock
    from engine.run.shown import show_run, summarize
    from engine.run.status import Status, write_status
    from eqat_tui import display, run_text
    from eqat_tui.lines import plain
    from eqat_tui.views import monitor, run_charts, runs

    run = recorded("running")
    view = view_of(run, "running", eta=100.0)
    with RunLock(run.lock_path):
        write_status(run, Status(phase="block_ap", block=3, blocks=6, heartbeat=2e9))
        listed, report = summarize(run), run_text.report(show_run(run))
    assert view.state.block == 3
    assert "block 3 of 0–5" in plain(monitor.progress(view, 100)[0])
    assert "block 3 of 0–5" in display.position(view.state)
    assert "block 3 of 0–5" in report
    assert "Block-AP 3 of 0–5" in run_text.state_words(listed)
    assert "Block-AP 3 of 0–5" in plain(runs.rows([listed], frozenset(), 100, 0.0)[1][0])
    now = next(row for row in monitor.block_table(view, 60)[1] if "now" in plain(row))
    assert plain(now).split()[0] == "3"
    assert run_charts.drawn(view, "loss", None)[0] == "loss of block 3"
    assert run_charts.x_range(view, "profile", None) == (0, 5)
    assert any(entry.text.startswith("checkpoint") and "block 2" in entry.text for entry in view.journal)
    assert [row["index"] for row in show_run(run)["blocks"]][:3] == [0, 1, 2]


# -- an attempt that was killed ------------------------------------------------------------------------


def test_a_killed_attempt_stays_in_the_journal_while_the_next_one_starts(recorded: Recorded) -> None:
    from engine.run.lock import RunLock
    from engine.run.status import Launched
    from engine.system.files import atomic_write_json
    from eqat_tui.feed import LiveFeed

    run = recorded("crashed")
    feed = LiveFeed(run)
    died = "attempt 1 died without a word"
    assert died in feed.poll().journal[-1].text
    began = feed.poll().journal[-1].t + 10
    atomic_write_json(run.launch_path, Launched(pid=1, host="h", attempt=2, t=began, created=began))
    with RunLock(run.lock_path):
        view = feed.poll()
        assert view.liveness == "starting"
        assert died in view.journal[-1].text
    view = feed.poll()
    assert view.liveness == "crashed"
    last = view.journal[-2:]  # killed before its first word, with nothing of its own in the log
    assert died in last[0].text
    assert last[1].text.startswith("attempt 2 ended before the first word: ")


@pytest.mark.parametrize("name", RECORDED)
def test_the_recorded_logs_have_no_attempt_that_is_not_spoken_of(name: str, recorded: Recorded) -> None:
    run = recorded(name)
    texts = [entry.text for entry in view_of(run, "done").journal]
    assert not any("before the first word" in text for text in texts)
