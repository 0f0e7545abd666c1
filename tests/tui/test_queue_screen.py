"""The queue and the sweeps in the app: how far they are, in which order, and what their runs came to."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from app_tools import MONOCHROME, app_of, drive, picture, press, settled, told, until
from logs import START
from textual.pilot import Pilot
from textual.widgets._toast import Toast
from waiting import PATIENCE

from engine.config.derived import resolve
from engine.config.loading import load
from engine.config.sweeps import combinations, typed_axis
from engine.run.directory import RunDirectory
from engine.run.members import Failure
from engine.run.queue import Over, Queue
from engine.run.sweep import Sweep
from eqat_tui.app import EqatApp
from eqat_tui.groups import Group, Row, read_groups
from eqat_tui.lines import plain, width_of
from eqat_tui.screens.base import READ_ONLY
from eqat_tui.screens.dialogs import Confirm
from eqat_tui.screens.runs import Catalogue, CompareScreen
from eqat_tui.views import groups as views

Recorded = Callable[[str], RunDirectory]
Same = Callable[[str, str], None]
Play = Pilot[Any]
SWEEP = "sweep-20251124-1600-smoke-0001"


@pytest.fixture
def queue(recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A done, a stopped and a failed entry, and two that wait; and a sweep of two that are done and one that
    waits. Looked at a day later."""
    monkeypatch.setattr("time.time", lambda: START + 86_400)
    monkeypatch.setattr("socket.gethostname", lambda: "hal")
    monkeypatch.setenv("EQAT_STATE_DIR", "state")
    done, stopped = recorded("finished"), recorded("stopped")
    made = Queue()
    with made.changing():
        for bits in (4, 4, 8, 3, 2):
            made.add(resolve(load("smoke", overrides={"grid.bits": bits})), tmp_path / "runs")
        made.entries[0].run, made.entries[0].over = done.id, Over(outcome="done", t=START)
        made.entries[1].run, made.entries[1].over = stopped.id, Over(outcome="stopped", t=START)
        made.entries[2].error = Failure(message="is not there any more", where="runs", exit_code=3)
        made.entries[2].over = Over(outcome="failed", t=START)
    swept = combinations(load("smoke"), [typed_axis("grid.bits=2,3,4")])
    sweep = Sweep.create(tmp_path / "runs", "smoke", swept)
    sweep.members[0].run = sweep.members[2].run = done.id
    sweep.write()
    sweep.path.rename(tmp_path / "runs" / SWEEP)
    return made


@pytest.mark.parametrize("size", [(80, 24), (60, 20)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_queue_and_a_sweep_have_their_picture(
    size: tuple[int, int], queue: Queue, same_picture: Same
) -> None:
    taken: list[str] = []

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: SWEEP in picture(app))
        await press(pilot, "down", "down")
        taken.append(await settled(pilot))

    drive(app_of(mode="queue"), script, size)
    assert "stays so; r gives it another turn" in taken[0]
    same_picture(f"queue-{size[0]}x{size[1]}", taken[0])


def test_in_ascii_it_is_ascii(queue: Queue) -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: SWEEP in picture(app))
        assert (await settled(pilot)).isascii(), picture(app)

    drive(app_of(mode="queue", terminal=MONOCHROME), script)


def order(queue: Queue) -> list[int]:
    queue.read()
    return [entry.number for entry in queue.entries]


def test_entries_are_moved_and_taken_out_and_runs_are_compared(queue: Queue) -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: SWEEP in picture(app))
        await press(pilot, "less_than_sign")
        assert told(app)[-1] == "no entry of the queue is under the cursor"
        await press(pilot, "down", "less_than_sign")
        assert told(app)[-1] == "its turn is over"
        await press(pilot, "down", "down", "down", "down", "less_than_sign")
        await until(pilot, lambda: order(queue) == [1, 2, 3, 5, 4])
        await until(pilot, lambda: "►     5" in picture(app))  # the cursor stays on it
        await press(pilot, "less_than_sign")
        assert told(app)[-1] == "it is the first of those that wait"
        assert "(< earlier)" in picture(app)
        await press(pilot, "greater_than_sign")
        await until(pilot, lambda: order(queue) == [1, 2, 3, 4, 5])
        await until(pilot, lambda: "(> later)" in picture(app))
        await press(pilot, "greater_than_sign")
        assert told(app)[-1] == "it is the last of those that wait"
        await press(pilot, "delete")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        assert "Take entry 5" in picture(app)
        await press(pilot, "y")
        await until(pilot, lambda: order(queue) == [1, 2, 3, 4])
        await press(pilot, "P")
        await until(pilot, lambda: "paused" in picture(app).splitlines()[3])
        # Folded groups show none of their runs; those of a group are compared, or those that are marked.
        await press(pilot, "g", "enter")
        await until(pilot, lambda: "tiny-llama w4g32 smoke" not in picture(app))
        assert "+ queue of hal" in picture(app)
        await press(pilot, "enter", "equals_sign")
        await until(pilot, lambda: isinstance(app.screen, CompareScreen))
        await until(pilot, lambda: "2 runs" in picture(app))
        await press(pilot, "escape", "down", "enter")
        await until(pilot, lambda: "[3 Result]" in picture(app))

    drive(app_of(mode="queue"), script)


@pytest.fixture
def many(recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Sweep]:
    """Makes a sweep whose runs are all done, each of them better than the one before."""
    monkeypatch.setenv("EQAT_STATE_DIR", "state")
    done = recorded("finished")

    def make(count: int) -> Sweep:
        values = ",".join(map(str, range(1, count + 1)))
        swept = combinations(load("smoke"), [typed_axis(f"runtime.seed={values}")])
        sweep = Sweep.create(tmp_path / "runs", "smoke", swept)
        for number, member in enumerate(sweep.members, 1):
            copy = shutil.copytree(done.path, done.path.with_name(f"{done.id}-{number:02}"))
            log = copy / "events.jsonl"
            worse = f'"stage":"e2e_qp","perplexity":{100.0 - number}'
            log.write_text(re.sub(r'"stage":"e2e_qp","perplexity":[0-9.]+', worse, log.read_text()))
            member.run = copy.name
        sweep.write()
        return sweep

    return make


@pytest.mark.parametrize("count", [6, 28])
def test_all_runs_of_a_sweep_are_compared_or_it_is_said_which(
    count: int, many: Callable[[int], Sweep]
) -> None:
    sweep = many(count)

    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: sweep.id in picture(app))
        await press(pilot, "down", "equals_sign")
        await until(pilot, lambda: isinstance(app.screen, CompareScreen))
        await until(pilot, lambda: f"{min(count, 26)} runs" in picture(app))
        said = f"the best 26 of 28 runs are compared; eqat sweep show {sweep.id} shows all"
        assert told(app) == ([said] if count == 28 else [])
        seen = picture(app)
        for _ in range(count):
            await press(pilot, "pagedown")
            seen += picture(app)
        ids = [f"{number:02}" for number in range(1, count + 1)]
        shown = [one for one in ids if f"tiny-llama-w4g32-fini-{one}" in seen]
        assert shown == ids[max(0, count - 26) :]
        assert f"{100.0 - count:g} ◂" in seen, "the best of all is marked, in whichever table it stands"

    drive(app_of(mode="queue"), script)


def test_who_only_looks_changes_nothing(queue: Queue) -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: SWEEP in picture(app))
        await press(pilot, "down", "down", "less_than_sign", "delete", "P", "r", "x")
        assert told(app) == [READ_ONLY] * 5

    drive(app_of(mode="queue", read_only=True), script)
    assert order(queue) == [1, 2, 3, 4, 5]
    assert not queue.paused


# -- what is shown -------------------------------------------------------------------------------------


def test_groups_say_how_far_they_are(queue: Queue) -> None:
    found = read_groups(Path("runs"), Catalogue().read)
    assert [(group.title, group.over, len(group.rows)) for group in found] == [
        ("queue of hal", 3, 5),
        (SWEEP, 2, 3),
    ]
    assert [row.state for row in found[0].rows] == ["done", "stopped", "failed", "waiting", "waiting"]
    assert [(row.what, row.state) for row in found[1].rows] == [
        ("grid.bits=2", "done"),
        ("grid.bits=3", "waiting"),
        ("grid.bits=4", "done"),
    ]
    assert found[0].rows[2].error == "is not there any more"


@pytest.mark.parametrize("width", [20, 57, 77, 200])
def test_no_line_is_wider_than_its_room(queue: Queue, width: int) -> None:
    groups = read_groups(Path("runs"), Catalogue().read)
    groups.append(Group("q", "名" * 60, "p" * 300, (), False, False, "x" * 300))
    groups.append(
        Group("r", "r", "", (Row(1, "名" * 200, "waiting", "waiting", None, None, "e" * 99),), True, True, "")
    )
    shown = views.items(groups, ())
    assert len(shown) == 2 + 5 + 3 + 1 + 2
    for item, row in zip(shown, views.rows(shown, (), (), width)[1], strict=True):
        assert width_of(row) <= width, plain(row)
        assert all(width_of(line) <= width for line in views.details(item, width))


def test_a_damaged_queue_is_told_and_hides_no_sweep(queue: Queue) -> None:
    (queue.path / "queue.json").write_text("{")
    found = read_groups(Path("runs"), Catalogue().read)
    assert [group.name for group in found] == ["queue", SWEEP]
    assert "queue.json" in found[0].problem
    assert "cannot be read" in plain(views.rows(views.items(found, ()), (), (), 200)[1][0])


def test_one_run_is_no_runs() -> None:
    waits = Row(1, "a", "waiting", "waiting", None, None, "")
    for rows, words in ((), "0 runs"), ((waits,), "1 run"), ((waits, waits), "2 runs"):
        group = Group("queue", "queue of hal", "", rows, False, False, "")
        assert plain(views.details(views.Item(group, None), 80)[0]) == f"queue of hal  {words}"


def test_a_run_at_work_counts_by_what_it_has_behind_it() -> None:
    summary = {"seconds": 30.0, "eta_s": 10.0, "waiting": None, "phase": "block_ap", "perplexity": {}}
    summary |= {"block": 3, "blocks": 6, "state": "running"}
    rows = (
        Row(1, "a", "done", "over", None, None, ""),
        Row(2, "b", "running", "now", None, summary, ""),
        Row(3, "c", "waiting", "waiting", None, None, ""),
    )
    group = Group("s", "s", "", rows, True, False, "")
    assert group.share == pytest.approx((1 + 0.75) / 3)
    lines = [plain(line) for line in views.rows(views.items([group], ()), (), (), 100)[1]]
    assert "1 of 3 done  at work" in lines[0]
    assert lines[2].endswith("▶ running Block-AP 3 of 0–5, 0:10 left")


def test_notes_that_came_fast_give_their_lines_back(queue: Queue) -> None:
    async def script(pilot: Play, app: EqatApp) -> None:
        await until(pilot, lambda: SWEEP in picture(app))
        before = await settled(pilot)
        for note in ("its turn is over", "its run is at work", "the queue goes on"):
            app.notify(note, timeout=PATIENCE)  # one that is over sooner may never be seen on a busy machine
            await until(pilot, lambda note=note: note in picture(app))  # type: ignore[misc]
            await until(pilot, lambda: len(app.screen.query("ToastHolder")) == 1)
        await pilot.click(Toast)  # does what the end of its time does
        await until(pilot, lambda: picture(app) == before)

    drive(app_of(mode="queue"), script, (60, 20), notes=True)
