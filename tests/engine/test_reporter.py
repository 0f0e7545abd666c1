"""What the engine lets others see while it works: a heartbeat, an estimate, readings of the machine."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_runs import Child, of
from waiting import wait_until

from engine import reporter as reporters
from engine.config.run import RunConfig
from engine.config.stages import phases_of
from engine.reporter import Reporter
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.liveness import classify, run_state
from engine.run.status import Status, read_status
from engine.telemetry import Telemetry, peak_host_bytes, reset_peaks
from engine.time_left import Estimate

Make = Callable[..., RunDirectory]
CPU = torch.device("cpu")
PHASES = [*phases_of(RunConfig()), "rtn", "generate"]


@pytest.fixture
def run(make: Make) -> RunDirectory:
    return make()


@pytest.fixture
def report(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reporter]:
    """A reporter whose status is written twenty times a second instead of every two seconds."""
    monkeypatch.setattr(reporters, "STATUS_SECONDS", 0.05)
    made = Reporter(run, 1, CPU)
    yield made
    made.close()


def written(run: RunDirectory) -> tuple[int, int] | None:
    """Which file the status is; another one with every writing."""
    try:
        found = run.status_path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def status_after(run: RunDirectory) -> Status:
    """A status that was made after now: the first one that is written may have been made before."""
    for _ in range(2):
        before = written(run)
        wait_until(lambda before=before: written(run) != before)
    status = read_status(run)
    assert status is not None
    return status


class Clock:
    """Time as the reporter takes it, which passes when a test says so and not when the machine is busy."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self.time = time.time

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(reporters, "time", made)
    return made


# -- a real run ----------------------------------------------------------------------------------------


def seconds_per_step(run: RunDirectory, status: Status) -> float:
    """What a step of Block-AP had taken on average when this was the status."""
    (began,) = [event.t for event in of(run, events.PhaseStarted) if event.phase == "block_ap"]
    return (status.heartbeat - began) / ((status.block or 0) * (status.steps or 0) + (status.step or 0))


def test_while_an_engine_trains_its_heartbeat_its_estimate_and_its_readings_go_on(
    make: Make, engine: Callable[..., Child]
) -> None:
    # Half a minute of training; after four beats of it there is nothing more to learn.
    run = make(**{"block_ap.sequences": 16, "block_ap.epochs": 250})
    child = engine(run)
    seen: dict[float, Status] = {}

    def enough() -> bool:
        status = read_status(run)
        if status is not None and status.phase == "block_ap" and run_state(run) == "running":
            seen.setdefault(status.heartbeat, status)
        return len(seen) >= 4 and sum(found.eta_measured and bool(found.step) for found in seen.values()) >= 3

    child.until(enough)
    child.send(signal.SIGTERM)
    assert child.code() == 75

    beats = sorted(seen)
    assert max(later - earlier for earlier, later in itertools.pairwise(beats)) < reporters.GRACE_SECONDS
    assert all(status.pid == child.pid for status in seen.values())
    assert all(status.events_dropped == 0 for status in seen.values())
    # Until a twentieth of the phase is done they are the plan's.
    told = [beat for beat in beats if seen[beat].step and seen[beat].eta_measured]
    estimates = [seen[beat].eta_s for beat in told]
    assert len(estimates) >= 3
    assert all(eta is not None and 0 < eta < 3600 for eta in estimates)
    # They go by what the machine does, and how fast it is at a moment is decided by the system: the whole
    # grows and shrinks with the seconds that a step has taken until then.
    paces = [seconds_per_step(run, seen[beat]) for beat in told]
    wholes = [beat - beats[0] + (seen[beat].eta_s or 0.0) for beat in told]
    assert wholes[-1] / paces[-1] < 2 * wholes[0] / paces[0]

    started, finished = of(run, events.RunStarted)[0], of(run, events.RunFinished)[0]
    seconds = finished.mono - started.mono
    readings = of(run, events.Memory)
    assert 2 <= len(readings) <= 1.2 * seconds + 1, "at most one a second"
    for reading in readings:
        assert reading.host_used is not None
        assert reading.host_peak is not None
        assert 0 < reading.host_used <= 1.05 * reading.host_peak
        assert reading.host_available
        assert reading.disk_free
        assert reading.gpu_used is None
    for phase in of(run, events.PhaseFinished):
        assert phase.peak_host_bytes is not None
        assert phase.peak_host_bytes > 50 << 20
        assert phase.peak_gpu_bytes is None
        assert phase.seconds > 0
    metrics = of(run, events.Metric)
    assert all(m.tokens_per_second for m in metrics if m.lr)
    # Four a second, and the first and last of each block; a validation loss is never left out.
    steps = [m for m in metrics if m.val_loss is None]
    blocks = len(of(run, events.BlockStarted))
    assert len(steps) <= 4 * (metrics[-1].mono - metrics[0].mono) + 3 * blocks


# -- heartbeat -----------------------------------------------------------------------------------------


def test_a_loop_that_no_longer_beats_is_seen_although_the_status_is_still_written(
    run: RunDirectory, report: Reporter
) -> None:
    report.leave_if_asked()
    first = status_after(run)
    later = status_after(run)
    assert later.heartbeat == first.heartbeat, "the thread that writes the status must not beat for the loop"
    report.leave_if_asked()
    assert status_after(run).heartbeat > first.heartbeat


def test_an_announced_silence_is_not_taken_for_a_hang(run: RunDirectory, report: Reporter) -> None:
    def seen_as(status: Status, silence: float) -> str:
        return classify(
            lock_held=True,
            heartbeat_age=silence,
            grace=status.grace_s,
            finish_outcome=None,
            ever_started=True,
        )

    report.expect_silence(600)
    assert seen_as(status_after(run), 500) == "running"
    assert seen_as(status_after(run), 700) == "hung"
    report.beat()
    assert seen_as(status_after(run), 500) == "hung", "it counts until the next beat"
    report.expect_silence(1)
    assert seen_as(status_after(run), 30) == "running", "never less patient than usual"


# -- estimate ------------------------------------------------------------------------------------------


def test_the_estimate_is_the_plans_before_the_first_step_then_falls_as_steps_are_made(
    clock: Clock, report: Reporter
) -> None:
    report.begin(["prepare", "block_ap", "export"], {"prepare": 0.01, "block_ap": 0.4, "export": 0.1})
    with report.phase("prepare"):
        assert report.time_left() == Estimate(pytest.approx(0.51), measured=False)
    estimates = []
    with report.phase("block_ap"):
        for block in range(2):
            report.block_started(block, 2)
            for step in range(1, 5):
                clock.now += 0.05
                report.metric(step=step, steps=4, epoch=0, loss=1.0)
                estimates.append(report.time_left().seconds)
            report.block_finished()
    found = [eta for eta in estimates if eta is not None]
    assert len(found) == 8
    assert all(math.isfinite(eta) and eta >= 0 for eta in found)
    assert found == sorted(found, reverse=True)
    # Half of the phase took 0.2 s as planned: 0.2 s are left of it, and an export of 0.1 s.
    assert found[3] == pytest.approx(0.3, rel=0.1)


def test_blocks_that_were_restored_do_not_make_the_rest_look_quick(clock: Clock, report: Reporter) -> None:
    report.begin(["block_ap"], {"block_ap": 10.0})
    with report.phase("block_ap"):
        for block in range(8):
            report.block_started(block, 10)
            clock.now += 0.01
            report.block_finished(restored=True)
        report.block_started(8, 10)
        assert report.time_left().measured is False
        for step in (1, 2):
            clock.now += 0.2
            report.metric(step=step, steps=4, epoch=0, loss=1.0)
        eta = report.time_left().seconds
        # Half a block took 0.4 s, one and a half are left.
        assert eta == pytest.approx(1.2)


def test_while_nothing_happens_the_clock_of_a_phase_stands_still(
    clock: Clock, run: RunDirectory, report: Reporter
) -> None:
    report.begin(["block_ap"], {"block_ap": 40.0})
    with report.phase("block_ap"):
        for step in range(1, 5):
            clock.now += 1.0
            report.metric(step=step, steps=10, epoch=0, loss=1.0)
            before = report.time_left()
        report.pause("the disk is full")
        clock.now += 3600.0
        assert report.time_left() == before
        assert report.go_on() == pytest.approx(3600.0)
        assert report.time_left() == before
        assert report.go_on() == 0.0, "it did not wait again"
    assert [event.seconds for event in of(run, events.PhaseFinished)] == [pytest.approx(4.0)]


def test_a_training_that_goes_on_inside_a_block_is_not_taken_for_a_quick_one(
    clock: Clock, report: Reporter
) -> None:
    report.begin(["e2e_qp"], {"e2e_qp": 100.0})
    with report.phase("e2e_qp"):
        clock.now += 1.0
        report.metric(step=801, steps=1000, epoch=0, loss=1.0)
        assert not report.time_left().measured, "800 steps were there already"
        for step in range(802, 862):
            clock.now += 1.0
            report.metric(step=step, steps=1000, epoch=0, loss=1.0)
            report.time_left()
        assert report.time_left().seconds == pytest.approx(139.0, rel=0.05)


def test_the_estimate_never_fails_whatever_the_phases_do(report: Reporter) -> None:
    """It is computed by a thread while the loop goes on; an error there would end the heartbeat."""
    done = threading.Event()
    problems: list[BaseException] = []

    def watch() -> None:
        while not done.is_set():
            try:
                eta = report.time_left().seconds
                assert eta is None or math.isfinite(eta)
            except BaseException as error:
                problems.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for attempt in range(3):
        report.begin(list(PHASES), {} if attempt % 2 else dict.fromkeys(PHASES, 0.0))
        for name in PHASES:
            with report.phase(name):
                report.block_started(0, 1)
                report.metric(step=1, steps=1, epoch=0, loss=math.nan)
                report.block_finished()
    done.set()
    watcher.join()
    assert not problems


# -- readings ------------------------------------------------------------------------------------------


def test_peaks_belong_to_their_phase() -> None:
    reset_peaks(CPU)
    before = peak_host_bytes()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    high = peak_host_bytes()
    del held
    assert high - before > 50 << 20
    reset_peaks(CPU)
    after = peak_host_bytes()
    if after >= high:
        pytest.skip("this system does not let a process reset its peak")
    assert high - after > 30 << 20


def test_readings_come_once_a_second_until_it_is_closed(tmp_path: Path) -> None:
    """How late one comes is decided by the system; that none comes early, and none afterwards, is not."""
    heard: list[float] = []
    telemetry = Telemetry(CPU, tmp_path, lambda reading: heard.append(time.monotonic()))
    began = time.monotonic()
    wait_until(lambda: len(heard) >= 3)
    telemetry.close()
    assert all(later - earlier > 0.95 for earlier, later in itertools.pairwise([began, *heard]))
    threads = [thread.name for thread in threading.enumerate()]
    assert "telemetry" not in threads, "nothing reads any more"


def test_where_it_is_can_be_said_in_words(report: Reporter) -> None:
    report.begin(["block_ap"], {})
    with report.phase("block_ap"):
        report.block_started(3, 10)
        report.metric(step=7, steps=32, epoch=0, loss=1.0)
        assert report.position() == "block_ap, block 3, step 7 of 32"
