"""An error says where before it says what: however long the path is, the cause is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from app_tools import app_of, drive, picture, shown, until
from hypothesis import given
from hypothesis import strategies as st
from logs import RECORDED, Log, make_run
from rich.cells import cell_len
from textual.pilot import Pilot

from engine.run import events
from engine.run.directory import RunDirectory
from eqat_tui.app import EqatApp
from eqat_tui.feed import LiveFeed, ReplayFeed
from eqat_tui.groups import QUEUE, Group, Row
from eqat_tui.lines import SHORTEST_WORD, Line, in_few, plain, squeezed, wrap
from eqat_tui.views import groups, monitor, runs
from eqat_tui.words import within_run

Play = Pilot[Any]
CAUSE = "the disk is full, or files may not become as large (ulimit -f)"
OBJECT = f"checkpoints/objects/{'0123456789abcdef' * 4}.safetensors"
FAR = f"/mnt/{'a-folder-of-the-project/' * 8}model.safetensors"
NAME = "20251124-1600-tiny-llama-w4g32-full"
WIDTH = 78


def words(lines: Sequence[Line]) -> str:
    return " ".join(plain(row).strip() for row in lines)


def failed_at(where: Callable[[RunDirectory], str]) -> RunDirectory:
    """A run whose engine says that the disk was full at that place."""

    def story(run_id: str) -> Log:
        log = RECORDED["running"](run_id)
        place = where(RunDirectory(Path("runs").absolute() / NAME))
        hint = "free some space and start it again; nothing that was committed is lost"
        log.add(events.Error(code="disk_full", where=place, message=CAUSE, hint=hint, exit_code=7))
        log.add(events.RunFinished(outcome="failed", exit_code=7, seconds=5.0))
        return log

    return make_run(Path("runs"), story, name=NAME)


PLACES: dict[str, Callable[[RunDirectory], str]] = {
    "in the run": lambda run: str(run.path / OBJECT),
    "in a run that was moved": lambda run: f"/elsewhere/{run.path.name}/{OBJECT}",
    "elsewhere": lambda run: FAR,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", ["monitor", "result"])
def test_of_a_run_that_failed_the_cause_is_seen_at_80_columns(mode: str, place: str) -> None:
    run = failed_at(PLACES[place])

    async def script(pilot: Play, app: EqatApp) -> None:
        await shown(pilot)
        await until(pilot, lambda: "✗ " in picture(app))
        rows = picture(app).splitlines()
        assert CAUSE in " ".join(row.strip() for row in rows)
        mark = next(row for row in rows if row.startswith("✗ "))
        assert mark.startswith("✗ /mnt/a-folder" if place == "elsewhere" else "✗ checkpoints/objects/0123")

    drive(app_of(run, mode=mode), script)


@pytest.mark.parametrize("place", PLACES)
def test_so_it_is_in_the_journal_and_in_a_replay(place: str) -> None:
    run = failed_at(PLACES[place])
    replay = ReplayFeed(run)
    replay.seek(1.0)
    for view in (LiveFeed(run).poll(), replay.poll()):
        assert CAUSE in words(monitor.notices(view, 80))
        line = next(row for row in map(plain, monitor.journal(view.journal, WIDTH)) if "error: " in row)
        assert "the disk is full, or files may" in line
        assert len(line) == WIDTH
        told = OBJECT if place != "elsewhere" else FAR  # all of it, where there is room
        assert any(f"error: {told}: {CAUSE}" in plain(row) for row in monitor.journal(view.journal, 10_000))


def test_what_cannot_be_read_is_told_with_its_cause_in_lists_too() -> None:
    problem = f"{FAR}: Permission denied"
    unreadable = runs.unreadable(RunDirectory(Path("runs/a-run")), problem)
    assert "Permission denied" in words(runs.details(unreadable, WIDTH))
    group = Group(QUEUE, "queue of here", "", (), False, False, problem)
    assert "Permission denied" in words(groups.details(groups.Item(group, None), WIDTH))
    _, listed = groups.rows([groups.Item(group, None)], set(), set(), WIDTH)
    assert "Permission denied" in words(listed)
    row = Row(1, "what", "failed", "over", None, None, problem)
    assert "Permission denied" in words(groups.details(groups.Item(group, row), WIDTH))


def test_a_file_of_the_run_is_named_as_it_lies_in_the_run() -> None:
    assert within_run("/data/runs/a-run/eval/x.json", "/data/runs/a-run") == "eval/x.json"
    assert within_run("/other/a-run/eval/x.json", "box:/data/runs/a-run") == "eval/x.json"
    for other in ("/data/runs/a-run", "/data/runs/a-run-2/x", "data/a-run/x", "block_ap.epochs", ""):
        assert within_run(other, "/data/runs/a-run") == other


def test_a_long_word_begins_beside_the_mark_before_it() -> None:
    for size in (18, 19, 20, 21, 40, 200):
        first = plain(wrap(f"✗ {'x' * size}", 20)[0])
        assert first == f"✗ {'x' * 18}", size
    assert [plain(row) for row in wrap("two words", 8)] == ["two", "words"]


@given(st.text(st.sampled_from("ab /.:é字"), max_size=200), st.integers(1, 120))
def test_a_text_is_squeezed_as_far_as_its_long_words_allow(text: str, room: int) -> None:
    found = squeezed(text, room)
    if cell_len(text) <= room:
        assert found == text
    else:
        assert cell_len(found) <= room or all(cell_len(word) <= SHORTEST_WORD for word in found.split(" "))
    assert [word for word in found.split(" ") if "…" not in word] == [
        word for word, kept in zip(text.split(" "), found.split(" "), strict=True) if "…" not in kept
    ]


def test_what_fits_is_not_squeezed_and_the_end_gives_way_last() -> None:
    text = f"! {FAR} has no room"
    assert in_few(text, 200, 4) == wrap(text, 200)
    assert words(in_few(text, 30, 4)).endswith("has no room")
    assert plain(in_few("word " * 100, 20, 3)[-1]) == "…"
