"""Locks, requests and launches, each with real other processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import wait_until

from engine.config.derived import resolve
from engine.config.loading import load
from engine.errors import EqatError, ExitCode, PreflightError, UsageError
from engine.run import control, launch
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.run.lock import RunLock, holder, is_held, opened_by
from engine.run.state import load_state
from engine.run.status import Status, read_status, write_status

REPOSITORY = Path(__file__).parents[2]
CONFIG = resolve(load("smoke"))


@pytest.fixture
def python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``python -c code args``; what still runs afterwards is killed."""
    children: list[subprocess.Popen[str]] = []

    def start(code: str, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(code), *args]
        pipe = subprocess.PIPE
        children.append(subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, text=True))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


# -- lock ----------------------------------------------------------------------------------------------

HOLD = """
    import sys
    from engine.run.lock import RunLock
    lock = RunLock(sys.argv[1])
    lock.acquire()
    print("held", flush=True)
    sys.stdin.read(1)
    lock.release()
    print("released", flush=True)
    sys.stdin.read(1)
"""


def test_second_process_is_refused_and_told_who_holds_the_lock(
    run: RunDirectory, python: Callable[..., subprocess.Popen[str]]
) -> None:
    assert holder(run.lock_path) is None
    child = python(HOLD, str(run.lock_path))
    assert said(child) == "held"
    assert holder(run.lock_path) == child.pid
    with pytest.raises(PreflightError, match=f"process {child.pid}"):
        RunLock(run.lock_path).acquire()
    assert run_state(run) == "running"
    with pytest.raises(PreflightError, match=f"process {child.pid}"):
        launch.launch(run, module=("-c", ""))
    assert child.stdin is not None
    child.stdin.write("x")
    child.stdin.flush()
    assert said(child) == "released"
    with RunLock(run.lock_path):
        assert holder(run.lock_path) == os.getpid()
    assert not is_held(run.lock_path)


def test_asking_about_its_own_lock_does_not_lose_it(
    run: RunDirectory, python: Callable[..., subprocess.Popen[str]]
) -> None:
    with RunLock(run.lock_path):
        for _ in range(3):
            assert holder(run.lock_path) == os.getpid()
            assert run_state(run) == "running"
            with pytest.raises(PreflightError, match=f"process {os.getpid()}"):
                RunLock(run.lock_path).acquire()
        ask = "import sys; from engine.run.lock import holder; print(holder(sys.argv[1]))"
        assert said(python(ask, str(run.lock_path))) == str(os.getpid())


def test_forked_child_that_survives_sigkill_of_the_holder_does_not_keep_the_lock(
    run: RunDirectory, python: Callable[..., subprocess.Popen[str]]
) -> None:
    fork = """
        import os, sys, time
        from engine.run.lock import RunLock, is_held
        lock = RunLock(sys.argv[1])
        lock.acquire()
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
        sys.stdin.read(1)
    """
    parent = python(fork, str(run.lock_path))
    child = int(said(parent))
    try:
        assert holder(run.lock_path) == parent.pid
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # lives on, with the descriptor it inherited
        assert not is_held(run.lock_path)
        with RunLock(run.lock_path):
            assert is_held(run.lock_path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_pid_is_believed_only_of_a_process_that_has_the_lock_open(
    run: RunDirectory, python: Callable[..., subprocess.Popen[str]]
) -> None:
    child = python(HOLD, str(run.lock_path))
    assert said(child) == "held"
    assert opened_by(run.lock_path, child.pid)
    assert not opened_by(run.lock_path, os.getpid())
    for nobody in (-1, 0, 2**22 + 1):
        assert not opened_by(run.lock_path, nobody)
    assert holder(run.lock_path) == child.pid, "asking did not cost the lock"


def test_forked_child_knows_that_the_lock_is_its_parents(
    run: RunDirectory, python: Callable[..., subprocess.Popen[str]]
) -> None:
    fork = """
        import os, sys
        from engine.run.lock import RunLock, holder
        lock = RunLock(sys.argv[1])
        lock.acquire()
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, str(holder(sys.argv[1])).encode())
            os._exit(0)
        os.wait()
        print(os.read(read, 99).decode() == str(os.getpid()), holder(sys.argv[1]) == os.getpid(), flush=True)
    """
    assert said(python(fork, str(run.lock_path))) == "True True"


# -- requests ------------------------------------------------------------------------------------------


def test_request_of_another_process_is_pending_until_acknowledged(
    run: RunDirectory, python: Callable[..., subprocess.Popen[str]]
) -> None:
    assert control.pending(run) == []
    ask = """
        import sys
        from engine.run import control
        from engine.run.directory import RunDirectory
        print(control.request(RunDirectory.open(sys.argv[1]), "stop"), flush=True)
    """
    asked = said(python(ask, str(run.path)))
    second = control.request(run, "abort")
    found = control.pending(run)
    assert [(request.id, request.request) for request in found] == [(asked, "stop"), (second, "abort")]
    control.acknowledge(run, asked)
    control.acknowledge(run, asked)
    assert [request.id for request in control.pending(run)] == [second]
    assert control.discard_pending(run) == 1
    assert control.pending(run) == []


def test_files_that_are_no_requests_are_passed_over(run: RunDirectory) -> None:
    name = control.request(run, "stop")
    (run.control_dir / "note.json").write_text("{}")
    (run.control_dir / f"{name[:-1]}{'0' if name[-1] != '0' else '1'}.json").write_text("{")
    (run.control_dir / f"{'1' * 20}-{'a' * 8}.json").write_text('{"id":"x","request":"stop","t":1,"pid":1}')
    assert [request.id for request in control.pending(run)] == [name]


def test_request_outside_the_run_or_unknown_is_refused(run: RunDirectory) -> None:
    for wrong in ("../../x", "", "x" * 29, "/etc/passwd"):
        with pytest.raises(UsageError):
            control.acknowledge(run, wrong)
    with pytest.raises(UsageError, match="stop or abort"):
        control.request(run, "pause")  # type: ignore[arg-type]


# -- launch --------------------------------------------------------------------------------------------

ENGINE = """
import os, sys, time
from engine.run import event_log, control, events
from engine.run.directory import RunDirectory
from engine.run.status import Status, write_status
from engine.run.launch import this_attempt
from engine.run.lock import RunLock

run = RunDirectory.open(sys.argv[1])
with RunLock(run.lock_path), event_log.EventWriter(run.events_path, this_attempt(run)) as writer:
    argv = [*sys.argv[2:], os.path.realpath("/dev/stdin")]
    writer.emit(events.RunStarted(id=run.id, pid=os.getpid(), host="h", device="cpu", versions={}, argv=argv))
    print("to the log", flush=True)
    print("also to the log", file=sys.stderr, flush=True)
    while not (requests := control.pending(run)):
        write_status(run, Status(phase="block_ap", heartbeat=time.time()))
        time.sleep(0.02)
    control.acknowledge(run, requests[0].id)
    writer.emit(events.ControlAck(request=requests[0].request, id=requests[0].id))
    writer.emit(events.RunFinished(outcome="stopped", exit_code=75, seconds=1.0))
sys.exit(75)
"""


@pytest.fixture
def engine(tmp_path: Path) -> tuple[str, ...]:
    """A small engine that obeys the whole contract and computes nothing."""
    script = tmp_path / "small_engine.py"
    script.write_text(ENGINE)
    return (str(script),)


def test_launched_engine_is_detached_logged_stopped_and_resumed(
    run: RunDirectory, engine: tuple[str, ...]
) -> None:
    assert launch.next_attempt(run) == 1
    stale = control.request(run, "stop")  # asked of a run that was not running
    for attempt in (1, 2):
        pid = launch.launch(run, args=("--task", "x"), module=engine)
        wait_until(lambda: load_state(run).attempt == attempt)  # noqa: B023
        assert os.getsid(pid) == pid  # no terminal's signals reach it
        assert holder(run.lock_path) == pid
        assert run_state(run) == "running"
        assert load_state(run).argv == ("--task", "x", os.devnull)
        assert launch.exit_code(pid) is None
        request = control.request(run, "stop")
        wait_until(lambda: launch.exit_code(pid) is not None)  # noqa: B023
        assert launch.exit_code(pid) == 75
        state = load_state(run)
        assert (state.attempt, state.outcome, run_state(run)) == (attempt, "stopped", "stopped")
        acknowledged = [event.id for event in state.acknowledged]
        assert acknowledged[-1] == request
        assert stale not in acknowledged
        log = launch.log_path(run, attempt).read_text()
        assert "to the log\n" in log
        assert "also to the log\n" in log
    assert launch.next_attempt(run) == 3


def test_engine_outlives_the_hang_up_of_whoever_launched_it(
    run: RunDirectory, engine: tuple[str, ...]
) -> None:
    code = """
        import sys
        from engine.run import launch
        from engine.run.directory import RunDirectory
        print(launch.launch(RunDirectory.open(sys.argv[1]), module=(sys.argv[2],)), flush=True)
        sys.stdin.read(1)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(run.path), *engine]
    pipe = subprocess.PIPE
    # A process group of its own, as a shell gives it: the hang-up goes to the group.
    launcher = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    )
    pid = int(said(launcher))
    wait_until(lambda: holder(run.lock_path) == pid)
    os.killpg(launcher.pid, signal.SIGHUP)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.communicate()
    time.sleep(0.1)
    assert run_state(run) == "running"
    control.request(run, "stop")
    wait_until(lambda: run_state(run) == "stopped")


def test_engine_that_is_killed_has_crashed_and_can_be_launched_again(
    run: RunDirectory, engine: tuple[str, ...]
) -> None:
    pid = launch.launch(run, module=engine)
    wait_until(lambda: holder(run.lock_path) == pid)
    wait_until(lambda: load_state(run).attempt == 1)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: launch.exit_code(pid) == -signal.SIGKILL)
    assert run_state(run) == "crashed"
    again = launch.launch(run, module=engine)
    wait_until(lambda: load_state(run).attempt == 2)
    control.request(run, "stop")
    wait_until(lambda: launch.exit_code(again) == 75)


def test_engine_that_dies_before_its_first_word_has_crashed(run: RunDirectory) -> None:
    pid = launch.launch(run, module=("-c", "raise SystemExit('no libraries')"))
    wait_until(lambda: run_state(run) == "crashed")
    wait_until(lambda: launch.exit_code(pid) == 1)
    assert "no libraries" in launch.log_path(run, 1).read_text()


def test_python_that_is_missing_is_a_preflight_error(run: RunDirectory) -> None:
    with pytest.raises(PreflightError, match="cannot be started"):
        launch.launch(run, python="/nowhere/python")
    assert run_state(run) == "created"


def test_attempt_from_elsewhere_is_not_believed(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    launch.log_path(run, 4).write_text("")
    for given, expected in {"4": 4, "": 5, "x": 5, "-1": 5, "0": 5}.items():
        monkeypatch.setenv(launch.ATTEMPT_VARIABLE, given)
        assert launch.this_attempt(run) == expected, given


def test_engine_of_the_working_directory_is_not_taken_for_ours(run: RunDirectory, tmp_path: Path) -> None:
    impostor = tmp_path / "engine"
    impostor.mkdir()
    (impostor / "__init__.py").write_text("raise SystemExit(99)")
    code = "import sys, engine; sys.exit(0 if hasattr(engine, '__version__') else 1)"
    environment = {**os.environ, **launch.engine_environment(1)}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0


# -- a full disk ---------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[RunDirectory]:
    """A run with a status, on a disk without a byte to spare."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        run = RunDirectory.create(disk / "runs", CONFIG)
        (run.path / "other-lock").touch()
        with RunLock(run.lock_path):
            assert write_status(run, Status(phase="prepare", heartbeat=1.0))
            fill(disk / "filler")
            yield run
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(path: Path) -> None:
    filler = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(filler, bytes(4096))
    os.close(filler)


def test_on_a_full_disk_an_engine_still_shows_that_it_lives_and_what_it_waits_for(
    full_disk: RunDirectory,
) -> None:
    now = time.time() + 60
    for waiting in ("the disk is full: " + "a checkpoint does not fit " * 20, ""):
        assert write_status(full_disk, Status(phase="block_ap", heartbeat=now, waiting=waiting))
        status = read_status(full_disk)
        assert status is not None
        assert (status.phase, status.heartbeat, status.waiting) == ("block_ap", now, waiting)
    assert not write_status(full_disk, Status(waiting="more than the file's place " * 500))
    status = read_status(full_disk)
    assert status is not None
    assert status.phase == "block_ap"


@pytest.mark.parametrize("own", [True, False])
def test_what_a_dead_engine_waited_for_is_not_told_of_the_next_one(tmp_path: Path, own: bool) -> None:
    """Nor in the moment between its taking the lock and renewing the time of the file."""
    run, waiting = RunDirectory.create(tmp_path / "runs", CONFIG), "the disk is full"
    said = Status(heartbeat=time.time() + 60, waiting=waiting, pid=os.getpid() if own else 1)
    with RunLock(run.lock_path):
        assert write_status(run, said)
        status = read_status(run)
    assert status is not None
    assert status.waiting == (waiting if own else "")


@pytest.mark.parametrize(("action", "heard"), [("stop", {"SIGTERM"}), ("abort", {"SIGTERM", "SIGINT"})])
def test_on_a_full_disk_an_engine_is_asked_by_signal(
    full_disk: RunDirectory,
    action: control.Action,
    heard: set[str],
    python: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(control, "opened_by", lambda path, pid: False)  # it is on another host
        with pytest.raises(EqatError) as caught:
            control.request(full_disk, action)
    assert caught.value.exit_code == ExitCode.DISK_FULL
    child = python(
        """
        import signal, sys, time
        from engine.run.lock import RunLock
        heard = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
        RunLock(sys.argv[1]).acquire()
        print("ready", flush=True)
        while len(heard) < int(sys.argv[2]):
            time.sleep(0.01)
        print(*heard, flush=True)
        """,
        str(full_disk.path / "other-lock"),
        str(len(heard)),
    )
    monkeypatch.setattr(full_disk, "lock_path", full_disk.path / "other-lock")
    assert said(child) == "ready"
    control.request(full_disk, action)
    assert set(said(child).split()) == heard
