"""The queue's file: whose turn it is, the order of entries, and changes by several at once."""

from __future__ import annotations

import errno
import shlex
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.derived import resolve
from engine.config.loading import load
from engine.config.sweeps import combinations, typed_axis
from engine.errors import EqatError, PreflightError, UsageError
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.events import RunFinished, RunStarted
from engine.run.finding import default_runs_dir, find_run
from engine.run.lock import RunLock
from engine.run.queue import MOST_OVER, Over, Queue, entry_state, turn_of
from engine.run.sweep import Sweep, find_sweep
from engine.system.guarded import bad_file
from eqat_tui.queue_text import queue_text
from eqat_tui.queueing import show_queue

CONFIG = resolve(load("smoke"))


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    """A queue of five entries."""
    made = Queue(tmp_path / "queue")
    with made.changing():
        for _ in range(5):
            made.add(CONFIG, tmp_path / "runs")
    return made


def numbers(queue: Queue) -> list[int]:
    Queue.read(queue)
    return [entry.number for entry in queue.entries]


@pytest.mark.parametrize(
    ("state", "attempt", "again", "unseen", "seen"),
    [
        (None, 0, 0, "start", "over"),
        ("created", 0, 0, "start", "over"),
        ("starting", 1, 0, "follow", "follow"),
        ("running", 1, 0, "follow", "follow"),
        ("hung", 1, 1, "follow", "follow"),
        ("done", 1, 1, "over", "over"),
        ("failed", 1, 0, "over", "over"),
        # Cut off with whoever worked on the queue, or before his eyes.
        ("crashed", 1, 0, "start", "over"),
        ("stopped", 1, 0, "over", "over"),
        # Stopped so that it goes on; then somebody went on with it, and stopped it again.
        ("stopped", 1, 1, "start", "start"),
        ("stopped", 2, 1, "over", "over"),
        ("failed", 3, 3, "start", "start"),
        ("unreadable", 0, 0, "over", "over"),
    ],
)
def test_whose_turn_it_is(state: str | None, attempt: int, again: int, unseen: str, seen: str) -> None:
    assert turn_of(state, attempt, again, seen=False) == unseen
    assert turn_of(state, attempt, again, seen=True) == seen


@pytest.mark.parametrize(
    ("number", "place", "order"),
    [
        (4, "first", [4, 1, 2, 3, 5]),
        (1, "last", [2, 3, 4, 5, 1]),
        (3, "up", [1, 3, 2, 4, 5]),
        (3, "down", [1, 2, 4, 3, 5]),
        (1, "up", [1, 2, 3, 4, 5]),
        (5, "down", [1, 2, 3, 4, 5]),
        (1, "first", [1, 2, 3, 4, 5]),
        (5, "last", [1, 2, 3, 4, 5]),
        (3, "3", [1, 2, 3, 4, 5]),
        (3, "4", [1, 2, 3, 4, 5]),
        (5, "2", [1, 5, 2, 3, 4]),
        (1, "4", [2, 3, 1, 4, 5]),
    ],
)
def test_an_entry_is_moved(queue: Queue, number: int, place: str, order: list[int]) -> None:
    before = numbers(queue)
    with queue.changing():
        moved = queue.move(number, place)
    assert numbers(queue) == order
    assert moved == (order != before)


def test_what_is_over_or_at_work_has_no_place(queue: Queue, tmp_path: Path) -> None:
    with queue.changing():
        run = RunDirectory.create(tmp_path / "runs", CONFIG)
        queue.entries[1].run = run.id
        queue.entries[0].over = Over(outcome="failed", t=1.0)
    with RunLock(run.lock_path):
        assert [entry_state(entry) for entry in queue.entries[:3]] == ["failed", "running", "waiting"]
        assert queue.upcoming() is queue.entries[1]
        with queue.changing():
            queue.move(5, "first")
        assert numbers(queue) == [1, 2, 5, 3, 4]
        wrong: list[Callable[[], None]] = [
            lambda: queue.move(1, "last"),
            lambda: queue.move(3, "1"),
            lambda: queue.move(3, "2"),
            lambda: queue.move(3, "middle"),
            lambda: queue.move(3, "٣"),
            lambda: queue.move(9, "first"),
            lambda: queue.remove([3, 9]),
        ]
        for change in wrong:
            with pytest.raises(UsageError), queue.changing():
                change()
        with pytest.raises(PreflightError, match="entry 2: is at work") as told, queue.changing():
            queue.remove([3, 2])
        with pytest.raises(PreflightError, match="entry 2: is at work"), queue.changing():
            queue.move(2, "last")
        (typed,) = shlex.split(told.value.hint)[2:3]  # the run may lie in any folder of runs
        assert find_run(default_runs_dir(), typed).path == run.path
        assert typed in queue_text(show_queue(queue))
        assert numbers(queue) == [1, 2, 5, 3, 4]  # all of a change or nothing
        with queue.changing():
            queue.remove([1, 4, 4])
        assert numbers(queue) == [2, 5, 3]
        with queue.changing():
            assert queue.add(CONFIG, tmp_path).number == 6  # a number is not given twice


def test_an_entry_has_another_turn_unless_its_run_is_done(queue: Queue, tmp_path: Path) -> None:
    with queue.changing():
        for entry, outcome in zip(queue.entries, ("done", "stopped"), strict=False):
            run = RunDirectory.create(tmp_path / "runs", CONFIG)
            entry.run = run.id
            with EventWriter(run.events_path, 1) as writer:
                writer.emit(RunStarted(id=run.id, pid=1, host="", device="cpu", versions={}, argv=[]))
                writer.emit(RunFinished(outcome=outcome, exit_code=0, seconds=1.0))  # type: ignore[arg-type]
        queue.settle()
    assert [entry.over and entry.over.outcome for entry in queue.entries[:3]] == ["done", "stopped", None]
    with pytest.raises(UsageError, match="entry 1: is done"), queue.changing():
        queue.put_back([2, 1])
    with queue.changing():
        queue.put_back([2])
        queue.settle()
    assert numbers(queue) == [1, 3, 4, 5, 2]
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert [entry_state(queue.entry(number)) for number in (1, 2)] == ["gone", "waiting"]
    (tmp_path / "elsewhere").rename(tmp_path / "runs")
    assert (queue.entry(2).again, queue.entry(2).place) == (1, "waiting")
    assert entry_state(queue.entry(2)) == "waiting"


@pytest.mark.parametrize(
    ("outcome", "state", "place", "left"),
    [
        ("done", "done", "over", False),
        ("failed", "failed", "over", False),
        ("stopped", "stopped", "over", False),
        (None, "crashed", "waiting", True),  # killed with whoever worked on the queue: it goes on
        ("never started", "waiting", "waiting", True),
    ],
)
def test_what_is_said_of_a_run_that_ended_while_nobody_worked_on_the_queue(
    tmp_path: Path, outcome: str | None, state: str, place: str, left: bool
) -> None:
    """Whoever worked on it was killed, so nobody has noted how the turn ended."""
    queue = Queue(tmp_path / "queue")
    run = RunDirectory.create(tmp_path / "runs", CONFIG)
    with queue.changing():
        entry = queue.add(CONFIG, tmp_path / "runs")
        entry.run = run.id
    if outcome != "never started":
        with EventWriter(run.events_path, 1) as writer:
            writer.emit(RunStarted(id=run.id, pid=1, host="", device="cpu", versions={}, argv=[]))
            with RunLock(run.lock_path):
                assert (entry_state(entry), entry.place) == ("running", "now")
            if outcome is not None:
                writer.emit(RunFinished(outcome=outcome, exit_code=0, seconds=1.0))  # type: ignore[arg-type]
    assert (entry_state(entry), entry.place, queue.has_work) == (state, place, left)
    (row,) = show_queue(queue)["entries"]
    assert (row["state"], row["turn"]) == (state, place)
    said = queue_text(show_queue(queue))
    assert ("nobody works on it" in said) == left
    assert ("was cut off, and goes on when the queue does" in said) == (outcome is None)
    with queue.changing():
        queue.settle()
    assert (entry_state(queue.entries[0]), queue.entries[0].place) == (state, place)  # noted, it is the same


@pytest.mark.parametrize("content", ["{", '{"entries": 5}', "\udcff"], ids=["torn", "other", "no text"])
def test_of_a_file_that_is_no_queue_it_is_said_what_to_do(queue: Queue, content: str) -> None:
    file = queue.path / "queue.json"
    whole = file.read_bytes()
    file.write_text(content, errors="surrogateescape")
    with pytest.raises(PreflightError, match=r"queue\.json: is not ") as told:
        Queue(queue.path)
    assert "moved away, eqat queue add begins another queue" in told.value.hint
    file.rename(file.with_name("queue.json.bad"))
    assert numbers(queue) == []
    file.write_bytes(whole)
    assert numbers(queue) == [1, 2, 3, 4, 5]


def test_a_queue_that_may_be_good_is_not_to_be_moved_away(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        try:
            raise PermissionError(errno.EACCES, "Permission denied")
        except OSError as error:
            raise bad_file(error, queue.path) from error

    monkeypatch.setattr("engine.run.queue.read_struct", refused)
    with pytest.raises(PreflightError, match=r"cannot be read: Permission denied$"):
        queue.read()


def test_paths_are_those_of_where_it_was_typed(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with queue.changing():
        entry = queue.add(load("smoke", overrides={"data.source": "a.txt"}), Path("runs"))
    monkeypatch.chdir("/")
    assert entry.configuration().data.source == str(tmp_path / "a.txt")
    assert entry.runs_dir == str(tmp_path / "runs")


def test_what_a_later_version_has_written_is_left_to_it(queue: Queue, tmp_path: Path) -> None:
    sweep = Sweep.create(
        tmp_path / "runs", "smoke", combinations(load("smoke"), [typed_axis("grid.bits=2,3")])
    )
    for path in (queue.path / "queue.json", sweep.path / "sweep.json"):
        path.write_text(later := path.read_text().replace('"schema": 1', '"schema": 2', 1))
        with pytest.raises(PreflightError, match="later version of eqat"):
            Queue(queue.path) if path.name == "queue.json" else find_sweep(tmp_path / "runs", "latest")
        held = queue.changing() if path.name == "queue.json" else sweep.held()
        with pytest.raises(PreflightError, match="later version of eqat"), held:
            raise AssertionError("this version would write it again, less what it does not know")
        assert path.read_text() == later


def test_what_is_over_is_not_remembered_for_ever(queue: Queue, tmp_path: Path) -> None:
    with queue.changing():
        for _ in range(MOST_OVER):
            queue.add(CONFIG, tmp_path)
        for entry in queue.entries[2:]:
            entry.over = Over(outcome="failed", t=1.0)
        queue.settle()
    assert numbers(queue) == [1, 2, *range(6, MOST_OVER + 6)]


def test_changes_at_once_are_made_one_after_the_other(tmp_path: Path) -> None:
    def adds() -> None:
        mine = Queue(tmp_path / "queue")
        for _ in range(4):
            with mine.changing():
                mine.add(CONFIG, tmp_path)

    threads = [threading.Thread(target=adds) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(Queue(tmp_path / "queue")) == list(range(1, 17))


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = Queue(tmp_path / "file" / "queue")
    with (
        pytest.raises(PreflightError, match=r"file/queue: cannot be made: .*EQAT_STATE_DIR"),
        nowhere.changing(),
    ):
        pass


def test_a_damaged_file_is_named_and_stays(queue: Queue) -> None:
    file = queue.path / "queue.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(EqatError, match=r"queue\.json"):
        Queue(queue.path)
    with pytest.raises(EqatError, match=r"queue\.json"), queue.changing():
        queue.paused = True
    assert "entries" in file.read_text()
