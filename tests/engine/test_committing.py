"""A block is published beside other work, and whatever ends that work does not undo it."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_runs import E, of
from waiting import PATIENCE

from engine.checkpoints.commits import Checkpoints
from engine.checkpoints.store import CheckpointStore
from engine.config.model import ModelConfig
from engine.config.run import RunConfig
from engine.config.runtime import RuntimeConfig
from engine.errors import EqatError, ExitCode, PreflightError, StopRequested
from engine.reporter import Reporter
from engine.run import events
from engine.run.directory import RunDirectory

IDENTITY = {"what": "test"}
ENTRIES = {"block-000": {"words": torch.arange(1000, dtype=torch.int32)}}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    run = RunDirectory.create(tmp_path, RunConfig(model=ModelConfig(source="random://tiny-llama")))
    report = Reporter(run, 1, torch.device("cpu"))
    report.begin(["block_ap"], {"block_ap": 1.0})
    yield Checkpoints(CheckpointStore(run.checkpoints_dir, IDENTITY), report, RuntimeConfig())
    report.close()


def published(checkpoints: Checkpoints) -> bool:
    """As another process would find it."""
    store = CheckpointStore(checkpoints.store.directory, IDENTITY)
    return "block-000" in store and torch.equal(
        store.get("block-000")["words"], ENTRIES["block-000"]["words"]
    )


def told(checkpoints: Checkpoints, kind: type[E]) -> list[E]:
    checkpoints.report.events.close()
    return of(checkpoints.report.run, kind)


def test_it_is_written_beside_what_happens_in_the_context(checkpoints: Checkpoints) -> None:
    here: set[str] = set()
    real = checkpoints.store.put

    def put(name: str, tensors: object) -> None:
        here.add(threading.current_thread().name)
        real(name, tensors)  # type: ignore[arg-type]

    checkpoints.store.put = put  # type: ignore[method-assign, assignment]
    with checkpoints.committing("block_ap", 0, ENTRIES):
        pass
    assert here == {"checkpoint"}, "a thread of its own"
    assert published(checkpoints)
    (event,) = told(checkpoints, events.CheckpointCommitted)
    assert (event.block, event.generation) == (0, 1)


@pytest.mark.parametrize("end", [StopRequested(), KeyError("a bug")])
def test_what_ends_the_work_does_not_undo_it(checkpoints: Checkpoints, end: Exception) -> None:
    def work() -> None:
        with checkpoints.committing("block_ap", 0, ENTRIES):
            raise end

    with pytest.raises(type(end)):
        work()
    assert published(checkpoints)
    (event,) = told(checkpoints, events.CheckpointCommitted)
    assert (event.phase, event.block, event.generation) == ("block_ap", 0, 1)


def test_what_ends_the_work_is_said_and_not_what_kept_it_from_being_written(checkpoints: Checkpoints) -> None:
    def commit() -> object:
        raise EqatError("broken", exit_code=ExitCode.IDENTITY)

    def work() -> None:
        with checkpoints.committing("block_ap", 0, ENTRIES):
            raise KeyError("a bug")

    checkpoints.store.commit = commit  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyError):
        work()
    assert not told(checkpoints, events.CheckpointCommitted)


@pytest.mark.parametrize("when", ["meanwhile", "at the end", "after a stop"])
def test_an_abort_does_not_wait(checkpoints: Checkpoints, when: str) -> None:
    goes_on = threading.Event()
    real = checkpoints.store.commit
    abort = StopRequested(abort=True, exit_code=ExitCode.ABORTED)

    def commit() -> object:
        goes_on.wait(PATIENCE)
        return real()

    def work() -> None:
        with checkpoints.committing("block_ap", 0, ENTRIES):
            if when == "meanwhile":
                raise abort
            checkpoints.report.stop_asked = lambda: abort  # type: ignore[method-assign]
            if when == "after a stop":
                raise StopRequested

    checkpoints.store.commit = commit  # type: ignore[method-assign, assignment]
    with pytest.raises(StopRequested) as raised:
        work()
    assert raised.value.abort
    assert not published(checkpoints)
    goes_on.set()


@pytest.mark.parametrize("times", [1, 2])
def test_a_full_disk_is_waited_for(
    checkpoints: Checkpoints, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = checkpoints.store.commit, 0

    def commit() -> object:
        nonlocal failed
        if failed < times:
            failed += 1
            raise EqatError("no room", exit_code=ExitCode.DISK_FULL) from OSError(errno.ENOSPC, "no room")
        return real()

    monkeypatch.setattr("engine.checkpoints.commits.TRY_AGAIN_SECONDS", 0.0)
    checkpoints.store.commit = commit  # type: ignore[method-assign, assignment]
    with checkpoints.committing("block_ap", 0, ENTRIES):
        pass
    assert published(checkpoints)
    assert len(told(checkpoints, events.Warning)) == times - 1


@pytest.mark.parametrize("free", [[0, 99, 100], [99, 100], [200, 300, 200 + (1 << 20)]])
def test_it_goes_on_as_soon_as_there_is_room(
    checkpoints: Checkpoints, free: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of 100 bytes, or whatever kept it from fitting where there seemed to be room for it."""
    seen = iter(free)
    usage = lambda place: SimpleNamespace(free=next(seen))  # noqa: E731
    monkeypatch.setattr("engine.checkpoints.commits.shutil.disk_usage", usage)
    monkeypatch.setattr("engine.checkpoints.commits.WAIT_SECONDS", 0.0)
    tries = iter([EqatError("no room", exit_code=ExitCode.DISK_FULL), None])

    def write() -> str:
        if (failure := next(tries)) is not None:
            raise failure from OSError(errno.ENOSPC, "no room")
        return "written"

    assert checkpoints.patiently(write, 100) == "written"
    assert not list(seen), "it waited until then"


@pytest.mark.parametrize(
    ("needed", "free", "words"),
    [
        (619 << 10, 0, "a checkpoint of 619 KiB does not fit into the 0 KiB free"),
        (619 << 10, 618 << 10, "a checkpoint of 619 KiB does not fit into the 618 KiB free"),
        (3 << 20, 5 << 30, "a checkpoint of 3 MiB does not fit into the 5.0 GiB free"),  # a quota
    ],
)
def test_what_a_waiting_run_says_is_what_it_needs_and_what_was_free_when_it_looked(
    checkpoints: Checkpoints, needed: int, free: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr("engine.checkpoints.commits.shutil.disk_usage", lambda place: usage)
    monkeypatch.setattr("engine.checkpoints.commits.TRY_AGAIN_SECONDS", 0.0)
    said: list[str] = []

    def write() -> None:
        said.append(checkpoints.report.waiting)
        if len(said) < 3:
            raise EqatError("no room", exit_code=ExitCode.DISK_FULL) from OSError(errno.ENOSPC, "no room")

    checkpoints.patiently(write, needed)
    assert said[0] == "", "nothing is said before it had to wait"
    assert words in said[1]
    assert str(checkpoints.store.directory) in said[1]
    assert said[2] == said[1], "it is said once"
    assert checkpoints.report.waiting == "", "it does not wait any more"
    assert [event.message for event in told(checkpoints, events.Warning)] == [said[1]]


def test_another_failure_is_raised(checkpoints: Checkpoints) -> None:
    def commit() -> object:
        raise EqatError("broken", exit_code=ExitCode.IDENTITY)

    def work() -> None:
        with checkpoints.committing("block_ap", 0, ENTRIES):
            pass

    checkpoints.store.commit = commit  # type: ignore[method-assign, assignment]
    with pytest.raises(EqatError, match="broken"):
        work()


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")
LIMIT = OSError(errno.EFBIG, "File too large")


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("could not write: No space left on device (os error 28)"),
        Exception("Disk quota exceeded (os error 122)"),
        caused(RuntimeError("saving failed"), FULL),
        caused(EqatError("no room", exit_code=ExitCode.DISK_FULL), FULL),
        EqatError("no room", exit_code=ExitCode.DISK_FULL),
    ],
)
def test_a_full_disk_is_waited_for_however_it_is_told(
    checkpoints: Checkpoints, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoints.commits.TRY_AGAIN_SECONDS", 0.0)
    tries = iter([error, error, None])

    def write() -> str:
        if (failure := next(tries)) is not None:
            raise failure
        return "written"

    assert checkpoints.patiently(write, 100 << 10, "an export") == "written"
    assert not checkpoints.report.waiting
    (warning,) = told(checkpoints, events.Warning)
    assert "an export of 100 KiB does not fit" in warning.message


@pytest.mark.parametrize(
    "error",
    [
        LIMIT,
        Exception("File too large (os error 27)"),
        caused(EqatError("no room", exit_code=ExitCode.DISK_FULL), LIMIT),
        caused(EqatError("another", exit_code=ExitCode.IDENTITY), FULL),
        OSError(errno.EIO, "Input/output error"),
        KeyError("a bug"),
    ],
)
def test_what_room_would_not_mend_is_not_waited_for(checkpoints: Checkpoints, error: Exception) -> None:
    def write() -> str:
        raise error

    with pytest.raises(type(error)):
        checkpoints.patiently(write, 100)
    assert told(checkpoints, events.Warning) == []


def test_a_run_that_is_deleted_while_it_waits_ends(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoints.commits.WAIT_SECONDS", 0.0)
    delete = lambda: shutil.rmtree(checkpoints.store.directory)  # noqa: E731
    checkpoints.report.leave_if_asked = delete  # type: ignore[method-assign]

    def write() -> None:
        raise FULL

    with pytest.raises(PreflightError, match="No such file"):
        checkpoints.patiently(write, 1 << 60)
