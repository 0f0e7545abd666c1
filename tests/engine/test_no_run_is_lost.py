"""The promises about interruptions, each with a real engine: one test, one promise."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_runs import (
    Child,
    exported,
    inside,
    interrupted_inside,
    keeps_a_training,
    make_run,
    metrics,
    of,
    output,
    run_here,
    snapshots_at_any_cost,
    start,
)
from waiting import PATIENCE, wait_until

from engine.run import control, event_log, events, generations
from engine.run.directory import RunDirectory
from engine.run.liveness import run_state
from engine.run.status import read_status

Make = Callable[..., RunDirectory]
Engine = Callable[..., Child]

# Trainings of a second each, with a checkpoint as often as one can be written.
OFTEN = {
    "block_ap.sequences": 16,
    "block_ap.epochs": 5,
    "e2e_qp.sequences": 10,
    "e2e_qp.epochs": 3,
    "runtime.checkpoint_minutes": 1e-4,
    "runtime.checkpoint_share": 1.0,
}
VARIANTS: dict[str, dict[str, object]] = {
    "the teacher is Block-AP's stream": {},
    "the teacher has a text of its own": {"e2e_qp.sequence_length": 24},
    "no teacher, patience, clipping": {
        "e2e_qp.loss": "cross_entropy",
        "e2e_qp.patience": 2,
        "block_ap.grad_clip": 0.01,
        "block_ap.weight_decay": 0.1,
    },
}


@pytest.fixture
def whole(finished_once: Callable[..., RunDirectory]) -> Callable[..., dict[str, str]]:
    """What a variant exports when nobody interferes."""
    return lambda variant="the teacher is Block-AP's stream": exported(
        finished_once(**{**OFTEN, **VARIANTS[variant]})
    )


def warnings(run: RunDirectory, code: str) -> list[str]:
    return [e.message for e in of(run, events.Warning) if e.code == code]


# -- exact resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "streams"), [*zip(VARIANTS, ["stored", "recomputed", "recomputed"], strict=True)]
)
@pytest.mark.parametrize("phase", ["block_ap", "e2e_qp"])
def test_resume_is_bitwise_identical_after_a_kill_inside(
    make: Make,
    engine: Engine,
    whole: Callable[[str], dict[str, str]],
    phase: str,
    variant: str,
    streams: str,
) -> None:
    run = interrupted_inside(
        lambda: make(**{**OFTEN, **VARIANTS[variant], "runtime.streams": streams}),
        engine,
        lambda run: len(inside(run, phase)) > 3,
        signal.SIGKILL,
    )
    last = inside(run, phase)[-1]
    assert run_state(run) == "crashed"
    assert engine(run).code() == 0, output(run)
    first = metrics(run, phase, 2)[0]
    assert first.step > 1, "it began the training again"
    assert (first.block or 0, first.step) >= (last.block or 0, last.step)
    assert exported(run) == whole(variant)
    assert not warnings(run, "checkpoint")


def test_a_training_whose_start_was_searched_goes_on_with_the_same_bits(
    make: Make, engine: Engine, finished_once: Callable[..., RunDirectory]
) -> None:
    """The search is made again, and errors are left out from where it stood."""
    knobs = {**OFTEN, "grid.bits": 2, "block_ap.start": "search", "block_ap.drop_largest": 0.01}
    run = interrupted_inside(
        lambda: make(**knobs), engine, lambda run: len(inside(run, "block_ap")) > 3, signal.SIGKILL
    )
    assert engine(run).code() == 0, output(run)
    assert metrics(run, "block_ap", 2)[0].step > 1, "it began the training again"
    whole = finished_once(**knobs)
    assert exported(run) == exported(whole)
    assert all(event.verified for event in of(run, events.Export))
    losses = {event.block: event.initial_loss for event in of(whole, events.BlockFinished)}
    again = {event.block: event.initial_loss for event in of(run, events.BlockFinished, attempt=2)}
    assert again == losses


def test_what_a_kill_undoes_is_bounded_by_the_cadence(make: Make, engine: Engine) -> None:
    """After a resume the step is at most so far behind the last one seen as checkpoints are apart."""
    run = make(**OFTEN)
    child = engine(run, before=snapshots_at_any_cost)
    child.until(lambda: len(inside(run, "block_ap")) > 5)
    child.send(signal.SIGKILL)
    child.code()
    kept = inside(run, "block_ap")[-1]
    assert run_here(run) == 0
    first = metrics(run, "block_ap", 2)[0]
    assert first.block is not None
    assert kept.block is not None
    assert kept.step is not None
    assert (first.block, first.step) >= (kept.block, kept.step)  # the block may have ended meanwhile


def test_checkpoints_inside_a_training_come_only_as_often_as_promised(make: Make) -> None:
    run = make(**{**OFTEN, "runtime.checkpoint_minutes": 5.0})
    assert run_here(run) == 0
    assert not inside(run, "block_ap")
    assert not inside(run, "e2e_qp")
    never = make(**{**OFTEN, "runtime.checkpoint_minutes": 0.0})
    assert run_here(never) == 0
    assert not inside(never, "block_ap")


def killed_with_stored_streams(make: Make, engine: Engine) -> RunDirectory:
    """A run that was killed in block 2 or later and had stored its streams. How far it gets before the kill
    is decided by the system: one that was faster is made again."""

    def stands(run: RunDirectory) -> bool:
        begun = {event.block for event in of(run, events.BlockStarted)}
        return 2 in begun and bool(list(run.cache_dir.glob("streams-*-full.raw")))

    for _ in range(5):
        run = make(**{**OFTEN, "runtime.streams": "stored"})
        child = engine(run)
        wait_until(lambda run=run, child=child: stands(run) or not child.alive())
        if child.alive():
            child.send(signal.SIGKILL)
        if child.code() < 0 and stands(run):
            return run
    pytest.fail("every run was faster than its kill")


def test_a_damaged_stored_stream_is_computed_again_and_the_result_is_the_same(
    make: Make, engine: Engine, whole: Callable[..., dict[str, str]]
) -> None:
    for damage in ("flip", "delete"):
        run = killed_with_stored_streams(make, engine)
        (file, *_) = sorted(run.cache_dir.glob("streams-*-full.raw"))
        content = file.read_bytes()
        if damage == "flip":
            file.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        else:
            file.unlink()
        assert run_here(run) == 0
        assert any("computing them again" in message for message in warnings(run, "streams")), damage
        assert exported(run) == whole()


# -- crash consistency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated object", "flipped bit", "missing object", "torn generation"])
def test_a_damaged_newest_generation_falls_back_to_the_one_before_and_says_so(
    make: Make, engine: Engine, whole: Callable[..., dict[str, str]], damage: str
) -> None:
    run = make(**OFTEN)
    child = engine(run, before=snapshots_at_any_cost)
    child.until(lambda: len(inside(run, "block_ap")) > 3)
    child.send(signal.SIGKILL)
    child.code()
    number = generations.newest(run.checkpoints_dir)
    newest = generations.read_generation(run.checkpoints_dir, number)
    before = generations.read_generation(run.checkpoints_dir, number - 1)
    (digest, *_) = [d for d in newest.entries.values() if d not in before.entries.values()] or [None]
    place = generations.generation_path(run.checkpoints_dir, number)
    if damage == "torn generation" or digest is None:
        place.write_bytes(place.read_bytes()[:-20])
    else:
        file = generations.object_path(run.checkpoints_dir, digest)
        content = file.read_bytes()
        changed = {
            "truncated object": content[: len(content) // 2],
            "flipped bit": content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
        }
        if damage in changed:
            file.write_bytes(changed[damage])
        else:
            file.unlink()
    assert run_here(run) == 0
    assert any(f"generation {number} is damaged" in message for message in warnings(run, "checkpoint"))
    assert exported(run) == whole()


def test_killed_at_every_publication_point_it_ends_with_the_same_bytes(make: Make) -> None:
    """A checkpoint is an object, a generation, CURRENT; stored streams go before it. Die around each rename.

    The first block's publications one by one, then every seventeenth until the end.
    """
    settings: dict[str, object] = {
        "runtime.streams": "stored",
        "runtime.checkpoint_minutes": 2e-3,
        "runtime.checkpoint_share": 1.0,
        "evaluation.enabled": False,
    }
    complete = make(**settings)
    assert start(complete).code() == 0
    expected = exported(complete)
    struck, point = 0, 1
    while True:
        run = make(**settings)
        code = start(run, die_at=point).code()
        if code == 0:
            break
        assert code == -signal.SIGKILL, output(run)
        struck += 1
        assert start(run).code() == 0, output(run)
        assert exported(run) == expected, f"killed at publication point {point}"
        point += 1 if point < 7 else 17
    assert struck > 8


# -- stop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["block_ap", "e2e_qp"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_checkpoints_at_the_next_step_and_nothing_is_done_twice(
    make: Make, engine: Engine, whole: Callable[..., dict[str, str]], number: int, phase: str
) -> None:
    run = interrupted_inside(
        lambda: make(**{**OFTEN, "runtime.checkpoint_minutes": 5.0}),
        engine,
        lambda run: len(metrics(run, phase, 1)) > 2,
        number,
    )
    assert run_state(run) == "stopped"
    kept = inside(run, phase)[-1]
    assert kept.step is not None
    last = metrics(run, phase, 1)[-1]
    assert last.block != kept.block or kept.step >= last.step
    assert run_here(run) == 0
    first = metrics(run, phase, 2)[0]
    assert first.block == kept.block
    # The next step, or the validation at the end of an epoch that was all trained.
    assert first.step == kept.step + (first.val_loss is None)
    assert exported(run) == whole()


def test_the_second_signal_aborts_and_the_run_goes_on_from_the_last_checkpoint(
    make: Make, engine: Engine, whole: Callable[..., dict[str, str]]
) -> None:
    run = make(**OFTEN)
    child = engine(run, before=snapshots_at_any_cost)
    child.until(lambda: len(inside(run, "block_ap")) > 2)
    child.send(signal.SIGSTOP)  # so that both are there before it can act on the first
    child.send(signal.SIGINT)
    child.send(signal.SIGTERM)
    child.send(signal.SIGCONT)
    assert child.code() == 143
    assert run_state(run) == "aborted"
    kept, in_a_training = inside(run, "block_ap")[-1], keeps_a_training(run)
    assert run_here(run) == 0
    first = metrics(run, "block_ap", 2)[0]
    assert (first.block, first.step) >= (kept.block, kept.step)
    # Which step it was at is decided by the system: perhaps a block had just ended, and the next begins.
    assert first.step > 1 or not in_a_training
    assert exported(run) == whole()


def test_slurms_warning_followed_by_its_sigterm_is_a_stop_and_not_an_abort(
    make: Make, engine: Engine
) -> None:
    run = make(**OFTEN)
    child = engine(run)
    child.until(lambda: len(metrics(run, "block_ap", 1)) > 2)
    child.send(signal.SIGSTOP)
    child.send(signal.SIGUSR1)
    child.send(signal.SIGTERM)
    child.send(signal.SIGCONT)
    assert child.code() == 75


def test_a_hang_up_changes_nothing(make: Make, engine: Engine, whole: Callable[..., dict[str, str]]) -> None:
    run = make(**OFTEN)
    child = engine(run)
    child.until(lambda: len(metrics(run, "block_ap", 1)) > 2)
    child.send(signal.SIGHUP)
    assert child.code() == 0
    assert exported(run) == whole()


# -- disk full -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount(place)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def mount(place: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own can only be mounted by root")


def keep_full(path: Path, enough: Callable[[], bool], left: int = 16 << 10) -> None:
    """Use up the file system, but for room for a few lines of text, until it is ``enough``: whenever a
    generation of checkpoints makes room for the next, that is used up, too."""
    end = time.monotonic() + PATIENCE
    with path.open("ab", buffering=0) as file:
        while not enough():
            assert time.monotonic() < end
            found = os.statvfs(path)
            if (free := found.f_bavail * found.f_frsize) > left:
                with contextlib.suppress(OSError):
                    file.write(bytes(free - left))
            time.sleep(0.001)


def waiting(run: RunDirectory) -> str:
    status = read_status(run)
    return status.waiting if status is not None else ""


def kibibytes(number: str, unit: str) -> int:
    """A size as it is told, in KiB."""
    return int(number) * {"K": 1, "M": 1024}[unit]


def test_a_full_disk_during_a_checkpoint_pauses_the_run_and_room_lets_it_go_on(
    small_disk: Path, engine: Engine, whole: Callable[..., dict[str, str]]
) -> None:
    run = make_run(small_disk / "runs", OFTEN)
    child = engine(run, before=snapshots_at_any_cost)
    child.until(lambda: len(inside(run, "block_ap")) > 2)
    ballast = small_disk / "ballast"
    keep_full(ballast, lambda: bool(waiting(run)))
    generation = generations.newest(run.checkpoints_dir)
    begun = time.monotonic()
    keep_full(ballast, lambda: time.monotonic() > begun + 2)
    assert child.alive(), output(run)
    assert run_state(run) == "running"
    assert generations.newest(run.checkpoints_dir) == generation
    generations.read_generation(run.checkpoints_dir, generation)
    assert waiting(run)
    ballast.unlink()
    assert child.code() == 0, output(run)
    assert exported(run) == whole()
    assert [e.attempt for e in of(run, events.RunFinished)] == [1]
    assert "there is room again, after a pause of" in warnings(run, "disk_room")[-1]


def test_a_run_that_waits_for_room_says_so_and_can_be_stopped(make: Make, engine: Engine) -> None:
    """A quota on checkpoints only: their folder is the small disk, the rest of the run is not.

    How much is free when the engine looks is decided by the system: this test fills the disk, the engine
    gives back what it could not finish, and either may come first. So the figure is held to the disk's size
    here; what is said of which figure is decided in test_committing.py.
    """
    run = make(**OFTEN)
    mount(run.checkpoints_dir)
    try:
        child = engine(run, before=snapshots_at_any_cost)
        child.until(lambda: len(inside(run, "block_ap")) > 2)
        keep_full(run.checkpoints_dir / "ballast", lambda: bool(waiting(run)), left=0)
        said = waiting(run)
        words = r"the disk is full: a checkpoint of (\d+) ([KM])iB does not fit into the (\d+) ([KM])iB free"
        found = re.match(words, said)
        assert found, said
        assert 0 < kibibytes(*found.group(1, 2)) < 64 << 10
        assert 0 <= kibibytes(*found.group(3, 4)) <= 64 << 10
        assert str(run.checkpoints_dir) in said
        wait_until(lambda: warnings(run, "disk_full"))
        assert warnings(run, "disk_full")[0] == said
        assert child.alive()
        control.request(run, "stop")
        assert child.code() == 75
        (run.checkpoints_dir / "ballast").unlink()
        assert run_here(run) == 0
    finally:
        subprocess.run(["umount", "--lazy", str(run.checkpoints_dir)], check=True)


def full_event_log() -> None:
    """In this process every log of events lies on a disk without room."""
    event_log.open_regular = lambda *where, **how: os.open("/dev/full", os.O_WRONLY)


def test_an_event_log_that_cannot_be_written_does_not_end_the_training(
    make: Make, engine: Engine, whole: Callable[..., dict[str, str]]
) -> None:
    run = make(**OFTEN)
    assert engine(run, before=full_event_log).code() == 0, output(run)
    assert exported(run) == whole()
    status = read_status(run)
    assert status is not None
    assert status.events_dropped > 10


# -- what remains --------------------------------------------------------------------------------------


def test_a_finished_run_keeps_no_activation_cache_and_no_training_state(make: Make) -> None:
    for streams in ("stored", "recomputed"):
        run = make(**{**OFTEN, "runtime.streams": streams})
        assert run_here(run) == 0
        assert not run.cache_dir.exists()
        number = generations.newest(run.checkpoints_dir)
        content = json.loads(generations.generation_path(run.checkpoints_dir, number).read_text())
        assert "training" not in content["entries"]
        assert "training" not in content["facts"]
        assert "streams" not in content["facts"]


def test_a_run_that_goes_on_with_other_software_says_so(make: Make) -> None:
    run = make()
    control.request(run, "stop")
    assert run_here(run) == 75
    assert run_here(run) == 0
    manifest = json.loads(run.run_json.read_text())
    manifest["versions"]["torch"] = "1.0"
    run.run_json.write_text(json.dumps(manifest))
    assert run_here(run) == 0
    assert any("torch 1.0" in message for message in warnings(run, "changed"))
