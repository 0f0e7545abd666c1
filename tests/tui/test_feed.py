"""What a viewer makes of a run's files, whatever has become of them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from logs import LiveEngine, make_run, running, write_log

from engine.run import control, events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.lock import RunLock
from engine.run.state import load_state
from engine.run.status import Status, write_status
from eqat_tui import feed as feeds
from eqat_tui.feed import LiveFeed, ReplayFeed

Recorded = Callable[[str], RunDirectory]


def test_a_view_shows_what_the_commands_show(recorded: Recorded) -> None:
    run = recorded("finished")
    view = LiveFeed(run).poll()
    assert view.state.perplexity() == load_state(run).perplexity()
    assert view.liveness == "done"
    assert view.journal[-1].text == "done (exit code 0)"
    assert [entry.t for entry in view.journal] == sorted(entry.t for entry in view.journal)


def test_a_log_that_grows_is_read_on(recorded: Recorded) -> None:
    run = recorded("running")
    feed = LiveFeed(run)
    before = feed.poll().state.event_count
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(events.Warning(code="x", message="news"))
    view = feed.poll()
    assert view.state.event_count == before + 1
    assert "news" in view.journal[-2].text
    assert "died without a word" in view.journal[-1].text  # no engine holds this run


@pytest.mark.parametrize(
    ("held", "heartbeat", "liveness"),
    [(True, 0.0, "running"), (True, 9999.0, "hung"), (False, 0.0, "crashed")],
)
def test_liveness_follows_lock_and_heartbeat(
    held: bool, heartbeat: float, liveness: str, recorded: Recorded
) -> None:
    run = recorded("running")
    lock = RunLock(run.lock_path)
    if held:
        lock.acquire()
    old = time.time() - heartbeat
    write_status(run, Status(phase="block_ap", heartbeat=old, grace_s=60.0))
    if held:
        os.utime(run.lock_path, (old, old))
    try:
        view = LiveFeed(run).poll()
        assert view.liveness == liveness
        assert view.pid == (os.getpid() if held else None)
    finally:
        lock.release()


def test_a_crashed_engines_last_words_are_there(recorded: Recorded) -> None:
    run = recorded("crashed")
    run.logs_dir.joinpath("attempt-001.log").write_text("one\ntwo\x07\n")
    assert LiveFeed(run).poll().log_tail == ("one", "two ")


def test_a_vanished_directory_is_a_view(recorded: Recorded) -> None:
    run = recorded("running")
    feed = LiveFeed(run)
    feed.poll()
    shutil.rmtree(run.path)
    view = feed.poll()
    assert view.liveness == "gone"
    assert "gone" in view.problem
    assert view.state.block == 3  # what was seen stays


def test_an_unreadable_log_is_a_view(recorded: Recorded) -> None:
    run = recorded("running")
    run.events_path.unlink()
    run.events_path.mkdir()
    assert "cannot be read" in LiveFeed(run).poll().problem


def test_a_run_of_a_newer_version_is_shown_with_a_remark(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", running)
    log = running(run.id).events
    newer = events.RunStarted(
        id=run.id, pid=1, host="h", device="cpu", versions={"eqat": "999.0"}, argv=[], attempt=1
    )
    write_log(run, [newer, *log[1:]])
    with run.events_path.open("ab") as file:
        file.write(b'{"kind":"from.the.future","v":9,"seq":1}\n')
    run.config_toml.write_text(run.config_toml.read_text() + "\n[quantum]\nbits = 1\n")
    view = LiveFeed(run).poll()
    assert "not written by this version" in view.problem
    assert view.state.block == 3
    run.config_toml.write_text(run.config_toml.read_text().replace("\n[quantum]\nbits = 1\n", ""))
    assert "999.0" in LiveFeed(run).poll().problem


def test_a_request_is_seen_by_every_viewer_until_it_is_accepted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", None)
    with LiveEngine(run):
        feed, other = LiveFeed(run), LiveFeed(run)
        assert feed.poll().asked == ""
        request = control.request(run, "stop")
        assert (feed.poll().asked, feed.poll().accepted) == ("stop", False)
        assert other.poll().asked == "stop"
        control.acknowledge(run, request)
        with EventWriter(run.events_path, 1) as writer:
            writer.emit(events.ControlAck(request="stop", id=request))
        assert (other.poll().asked, other.poll().accepted) == ("stop", True)


def test_who_only_looks_writes_nothing(recorded: Recorded) -> None:
    run = recorded("running")

    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in sorted(run.path.rglob("*"))}

    before = files()
    feed = LiveFeed(run)
    for _ in range(3):
        feed.poll()
    ReplayFeed(run).poll()
    assert files() == before


# -- replay --------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(feeds.time, "monotonic", made)
    return made


def test_a_replay_ends_with_the_state_of_the_run(recorded: Recorded, clock: Clock) -> None:
    run = recorded("finished")
    feed = ReplayFeed(run, speed=2.0)
    blocks = set()
    for _ in range(1000):
        view = feed.poll()
        blocks.add(view.state.block)
        clock.now += 1.0
    assert blocks >= {0, 1, 2, 3, 4, 5}
    assert view.liveness == "done"
    whole = load_state(run)
    assert (view.state.metrics, view.state.block_rows) == (whole.metrics, whole.block_rows)
    assert view.replay is not None
    assert view.replay.position == 1.0


def test_twice_the_speed_takes_half_the_time(recorded: Recorded, clock: Clock) -> None:
    run = recorded("finished")
    feed = ReplayFeed(run, speed=2.0)
    clock.now += feed.duration / 4
    assert feed.poll().replay.position == pytest.approx(0.5)  # type: ignore[union-attr]
    feed.faster(2.0)
    clock.now += feed.duration / 8
    assert feed.poll().replay.position == pytest.approx(1.0)  # type: ignore[union-attr]


def test_a_replay_can_be_held_and_wound_back(recorded: Recorded, clock: Clock) -> None:
    feed = ReplayFeed(recorded("finished"))
    clock.now += feed.duration
    assert feed.poll().state.outcome == "done"
    feed.seek(-0.5)
    early = feed.poll()
    assert early.state.outcome is None
    clock.now += 100
    assert feed.poll().state.event_count == early.state.event_count  # the end held it
    feed.pause()
    clock.now += feed.duration
    assert feed.poll().state.outcome == "done"


def test_what_was_done_with_a_finished_run_is_not_replayed(recorded: Recorded, clock: Clock) -> None:
    run = recorded("finished")
    with EventWriter(run.events_path, 2) as writer:
        writer.emit(
            events.RunStarted(id=run.id, pid=1, host="h", device="cpu", versions={}, argv=[], task="export")
        )
        writer.emit(events.Error(code="x", where="", message="no room", hint="", exit_code=7))
        writer.emit(events.RunFinished(outcome="failed", exit_code=7, seconds=1.0, leaves="done"))
    feed = ReplayFeed(run)
    clock.now += feed.duration
    assert feed.poll().state.error is None
    live = LiveFeed(run).poll()
    assert (live.liveness, live.state.attempt, live.state.error) == ("done", 1, None)
    job = live.state.job
    assert job is not None
    assert (job.task, job.outcome, job.error and job.error.message) == ("export", "failed", "no room")
    assert sum(row.seconds for row in live.state.phases) == sum(
        row.seconds for row in feed.poll().state.phases
    )


def test_the_night_between_two_attempts_is_not_replayed(recorded: Recorded) -> None:
    assert ReplayFeed(recorded("resumed")).duration < 200  # an hour lies between the attempts


def test_a_replay_of_nothing_is_a_view(tmp_path: Path) -> None:
    assert ReplayFeed(make_run(tmp_path / "runs", None)).poll().state.event_count == 0
