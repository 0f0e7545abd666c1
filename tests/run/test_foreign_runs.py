"""A run that somebody else has made or changed: nothing outside of it is read, written or waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.derived import resolve
from engine.config.loading import load
from engine.errors import EqatError, ExitCode, PreflightError
from engine.run import control, event_log, events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventFollower, EventWriter, read_events, tail_events
from engine.run.events import RunFinished, RunStarted
from engine.run.housekeeping import clean_temporaries
from engine.run.launch import launch, next_attempt
from engine.run.liveness import last_events, run_state
from engine.run.lock import RunLock, is_held
from engine.run.redo import read_origin
from engine.run.shown import show_run, summarize
from engine.run.state import load_state
from engine.run.status import Launched, Status, process_alive, read_launched, read_status, write_status
from engine.system.files import atomic_write_json

FILES = (
    "lock",
    "status.json",
    "launch.json",
    "submitted.json",
    "events.jsonl",
    "run.json",
    "origin.json",
    "checkpoints/CURRENT",
    "config.toml",
)
FOLDERS = ("control", "logs", "checkpoints", "cache", "eval", "export")
START_UP = "alias ls='ls --color'\n"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A shell start-up file: whoever may append to it may run anything."""
    path = tmp_path / "home" / ".bashrc"
    path.parent.mkdir()
    path.write_text(START_UP)
    return path


def untouched(path: Path) -> bool:
    return path.read_text() == START_UP and [entry.name for entry in path.parent.iterdir()] == [path.name]


def started(run: RunDirectory, **fields: object) -> RunStarted:
    usual = {"id": run.id, "pid": 1, "host": "h", "device": "cpu", "versions": {}, "argv": []}
    return RunStarted(**{**usual, **fields})


def look(run: RunDirectory) -> None:
    """Everything that a list of runs, a screen or a command reads; errors of ours are allowed."""
    looks: tuple[Callable[[], object], ...] = (
        lambda: is_held(run.lock_path),
        lambda: read_status(run),
        lambda: read_launched(run),
        lambda: last_events(run),
        lambda: run_state(run),
        lambda: load_state(run),
        lambda: run.manifest(),
        lambda: run.config(),
        lambda: read_origin(run),
        lambda: control.pending(run),
        lambda: next_attempt(run),
        lambda: summarize(run),
        lambda: show_run(run),
    )
    for one in looks:
        try:
            one()
        except EqatError:
            continue


def write(run: RunDirectory) -> None:
    """Everything that is written into a run besides its checkpoints; errors of ours are allowed."""

    def emit() -> None:
        with EventWriter(run.events_path, 1) as writer:
            writer.emit(events.Warning(code="x", message="$(touch /tmp/x)"))

    def hold() -> None:
        with RunLock(run.lock_path):
            clean_temporaries(run)

    writes: tuple[Callable[[], object], ...] = (
        hold,
        emit,
        lambda: write_status(run, Status(phase="x")),
        lambda: control.request(run, "stop"),
        lambda: control.discard_pending(run),
        lambda: launch(run, module=("-c", "pass")),
        lambda: run.write_manifest({"id": run.id}),
    )
    for one in writes:
        try:
            one()
        except EqatError:
            continue


def in_place_of(run: RunDirectory, name: str) -> Path:
    """The name of one of the run's files, which is free now."""
    path = run.path / name
    path.unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_links_elsewhere_is_neither_read_nor_written_through(
    run: RunDirectory, precious: Path, name: str
) -> None:
    in_place_of(run, name).symlink_to(precious)
    look(run)
    write(run)
    assert untouched(precious)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_somebodys_file_too_is_not_written_into(
    run: RunDirectory, precious: Path, name: str
) -> None:
    """A hard link is no link: the file is regular, and writing into it writes into somebody's."""
    os.link(precious, in_place_of(run, name))
    look(run)
    write(run)
    assert precious.read_text() == START_UP


def test_events_are_not_appended_to_a_start_up_file(run: RunDirectory, precious: Path) -> None:
    run.events_path.symlink_to(precious)
    with pytest.raises(PreflightError) as caught:
        EventWriter(run.events_path, 1)
    assert str(run.events_path) in str(caught.value)
    assert untouched(precious)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FILES)
def test_nothing_waits_for_a_fifo_or_reads_a_device_without_end(run: RunDirectory, name: str) -> None:
    path = run.path / name
    for make in (os.mkfifo, lambda place: os.symlink("/dev/zero", place), os.mkdir):
        path.unlink(missing_ok=True)
        make(path)
        look(run)
        write(run)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_links_elsewhere_is_refused_and_nothing_is_written_there(
    run: RunDirectory, precious: Path, name: str
) -> None:
    place = run.path / name
    place.rmdir()
    place.symlink_to(precious.parent)
    look(run)
    write(run)
    assert untouched(precious)
    with pytest.raises(PreflightError, match="a link where a run has a folder") as caught:
        run.require_own()
    assert caught.value.where == str(place)
    with pytest.raises(PreflightError):
        launch(run)


def test_requests_behind_a_link_are_neither_answered_nor_renamed(run: RunDirectory, tmp_path: Path) -> None:
    control.request(run, "stop")
    run.control_dir.rename(tmp_path / "elsewhere")
    run.control_dir.symlink_to(tmp_path / "elsewhere")
    before = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    assert control.pending(run) == []
    with pytest.raises(PreflightError):
        control.acknowledge(run, before[0].removesuffix(".json"))
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == before


def test_a_run_of_another_user_is_looked_at_but_not_worked_on(run: RunDirectory) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    run.require_own()
    os.chown(run.logs_dir, 12345, 12345)
    assert run_state(run) == "created"
    with pytest.raises(PreflightError, match="belongs to user 12345") as caught:
        launch(run)
    assert caught.value.where == str(run.logs_dir)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        "[]",
        "null",
        "1" * 5000,
        "[" * 100_000,
        '{"pid": -1}',
        '{"heartbeat": null}',
        "\x00",
        "\ud800",
    ],
)
def test_no_content_of_a_status_or_a_launch_ends_in_more_than_nothing(
    run: RunDirectory, content: str
) -> None:
    for path in (run.status_path, run.launch_path, run.run_json, run.origin_path):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    look(run)
    assert run_state(run) == "created"


@pytest.mark.parametrize("pid", [-1, 0, 2**31, 2**63 - 1, 10**18])
def test_a_number_that_is_no_process_is_a_dead_one(run: RunDirectory, pid: int) -> None:
    assert not process_alive(pid, 1.0)
    host = os.uname().nodename
    atomic_write_json(run.launch_path, Launched(pid=pid, host=host, attempt=1, t=1.0, created=1.0))
    assert run_state(run) == "crashed"
    run.lock_path.write_text(f"{pid}\n")
    assert not is_held(run.lock_path)


# -- logs ----------------------------------------------------------------------------------------------


def test_a_log_that_is_one_huge_hole_takes_neither_time_nor_memory(run: RunDirectory) -> None:
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(started(run))
    with open(run.events_path, "r+b") as log:
        log.truncate(1 << 40)
    assert [type(event) for event in read_events(run.events_path)[0]] == [RunStarted]
    with EventWriter(run.events_path, 2) as writer:
        writer.emit(events.Warning(code="x", message="behind the hole"))
    found, offset = read_events(run.events_path)
    assert [type(event) for event in found] == [RunStarted, events.Warning]
    assert offset == run.events_path.stat().st_size


def test_a_line_longer_than_any_event_is_passed_over(run: RunDirectory) -> None:
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(started(run))
    with open(run.events_path, "ab") as log:
        for _ in range(70):
            log.write(b"x" * (1 << 20))
        log.write(b"\n")
    follower = EventFollower(run.events_path)
    assert len(follower.poll()) == 1
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(events.Warning(code="x", message="after it"))
    assert [event.seq for event in follower.poll()] == [2]


def test_the_end_of_a_log_is_found_behind_a_very_long_line(run: RunDirectory) -> None:
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(started(run, device="d" * 100_000))
    assert [type(event) for event in tail_events(run.events_path)] == [RunStarted]
    assert run_state(run) == "crashed"


def test_an_attempt_number_from_a_log_cannot_run_away(run: RunDirectory) -> None:
    line = event_log.encode(started(run, attempt=10**18, seq=1, t=1.0))
    run.events_path.write_bytes(line + b"\n")
    assert next_attempt(run) == 1


# -- what is done with a finished run ------------------------------------------------------------------


def write_attempts(run: RunDirectory, *attempts: list[events.Event]) -> None:
    for number, written in enumerate(attempts, start=1):
        with EventWriter(run.events_path, number) as writer:
            for event in written:
                writer.emit(event)


DONE = RunFinished(outcome="done", exit_code=0, seconds=1.0)


@pytest.mark.parametrize("task", ["export", "eval", "generate"])
def test_what_is_done_with_a_finished_run_leaves_it_done_when_it_is_killed(
    run: RunDirectory, task: str
) -> None:
    cut_off = [started(run, task=task, leaves="done"), *[events.Memory() for _ in range(2000)]]
    write_attempts(run, [started(run), DONE], cut_off)
    assert run.events_path.stat().st_size > 1 << 17, "the beginning lies before the end that is read"
    assert run_state(run) == "done"
    assert load_state(run).outcome == "done"
    job = load_state(run).job
    assert job is not None
    assert (job.task, job.outcome) == (task, None)


def test_one_that_died_before_its_first_word_leaves_the_run_done_too(run: RunDirectory) -> None:
    write_attempts(run, [started(run), DONE])
    dead = Launched(pid=2**22 + 1, host=os.uname().nodename, attempt=2, t=4e9, created=1.0, task="export")
    atomic_write_json(run.launch_path, dead)
    assert run_state(run) == "done"


def test_a_training_that_is_cut_off_is_still_a_crash(run: RunDirectory) -> None:
    write_attempts(run, [started(run), DONE], [started(run), *[events.Memory() for _ in range(2000)]])
    assert run_state(run) == "crashed"


# -- a full disk, and what a killed engine left --------------------------------------------------------


def test_a_creation_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise EqatError("the disk is full", exit_code=ExitCode.DISK_FULL)

    monkeypatch.setattr("engine.run.directory.atomic_write", full)
    with pytest.raises(EqatError) as caught:
        RunDirectory.create(tmp_path / "runs", resolve(load("smoke")))
    assert caught.value.exit_code == ExitCode.DISK_FULL
    assert list((tmp_path / "runs").iterdir()) == []


def test_half_written_status_files_of_a_dead_attempt_are_removed_and_nothing_else(run: RunDirectory) -> None:
    left = [".status.json.123.0123abcd.tmp", ".run.json.7.ffffffff.tmp"]
    kept = [".status.json.tmp", ".launch.json.123.0123abcd.tmp", "status.json.123.0123abcd.tmp", ".mine.tmp"]
    for name in (*left, *kept):
        (run.path / name).write_text("{")
    clean_temporaries(run)
    names = {path.name for path in run.path.iterdir()}
    assert not names & set(left)
    assert set(kept) <= names


def test_two_launches_at_once_say_who_works(run: RunDirectory) -> None:
    first = launch(run, module=("-c", "import time; time.sleep(20)"))
    try:
        with pytest.raises(PreflightError, match=f"already being worked on by process {first}"):
            launch(run)
    finally:
        os.kill(first, 9)
