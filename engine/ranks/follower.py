"""Another process than the first of a run: it computes its share of what they do together, and keeps nothing.

It hears no request of its own. Signals that reach it are passed on to the first process; when that one is
gone, it goes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

import msgspec
import psutil
import torch

from engine.checkpoints.followed import FollowedStore
from engine.config.run import RunConfig
from engine.errors import ExitCode, PreflightError
from engine.failures import as_eqat_error
from engine.phases.joining import Call, Prepared, joined, together
from engine.process import choose_device, prepare_process
from engine.ranks.others import (
    JOINING_KEY,
    LEADER_KEY,
    READY_SECONDS,
    RUN_KEY,
    Failure,
    failure_key,
    left_key,
    lives,
    process_key,
    ready_key,
)
from engine.ranks.place import Place
from engine.ranks.readings import telling
from engine.ranks.reporter import QuietReporter
from engine.run.control import STOP_SIGNALS
from engine.run.directory import RunDirectory
from engine.run.events import RankPeaks
from engine.system.printable import printable
from engine.telemetry import Telemetry
from engine.training.world import meeting_place, open_world

LOOK_SECONDS = 0.5
FAILED_SECONDS = 1.0


def work(run: RunDirectory, config: RunConfig, attempt: int, place: Place) -> int:
    """The exit code, once the first process has no more to do.

    Raises:
        PreflightError: where the first process does not come, or is one of another run.
    """
    store = _met(run, place)
    leaving = threading.Event()
    _listen_for(store, place, leaving)
    report: QuietReporter | None = None
    try:
        store.set(process_key(place.rank), str(os.getpid()))
        device = choose_device(config.runtime.device, config.runtime.gpus, place.local)
        report = QuietReporter(run, attempt, device, place.rank)
        prepare_process(config.runtime, device)
        store.set(ready_key(place.rank), "1")
        while not store.check([JOINING_KEY]):
            time.sleep(READY_SECONDS)
        world = open_world(store, place.rank, place.size, device)
        # By a connection of its own: whoever waits at the other one would keep this waiting.
        told = _connected(place)
        tell = telling(told, place.rank, lambda: world.last_wait)
        telemetry = Telemetry(device, run.path, tell)
        job = joined(run, config, world.told(Prepared), report, device, world)
        while True:
            call = world.told(Call)
            if not call.phase:
                leaving.set()
                telemetry.close()
                with contextlib.suppress(RuntimeError):  # the first process is gone, and asks no more
                    store.set(left_key(place.rank), "1")
                return 0
            assert isinstance(job.store, FollowedStore)
            job.store.take(call.contents)
            work_of_all = together(call.phase)
            assert work_of_all is not None
            with report.phase(call.phase):
                work_of_all(job)
                world.gathered(report.peaks(), RankPeaks)
    except BaseException as error:
        _wait_for_what_came_first(error)
        failure = as_eqat_error(error, report.position() if report else "starting", config)
        if failure.exit_code == ExitCode.BUG:
            traceback.print_exc()
        print(f"error: {printable(str(failure))}", file=sys.stderr, flush=True)
        store.set(failure_key(place.rank), msgspec.json.encode(Failure.of(failure)).decode())
        return int(failure.exit_code)


def _connected(place: Place) -> Any:
    return meeting_place(place.host, place.port, place.size, hosts=False, restarts=place.restarts)


def _met(run: RunDirectory, place: Place) -> Any:
    """Where all meet, once the first process is there."""
    try:
        store = _connected(place)
        # Two that were told the same port would else compute with each other's processes.
        there = store.get(RUN_KEY).decode()
    except RuntimeError as error:
        raise PreflightError(
            f"the first process of the run did not come to port {place.port} of {place.host}",
            where=f"rank {place.rank}",
            hint="what kept it from that is in its own output and in the run's log",
        ) from error
    if there != run.id:
        raise PreflightError(
            f"at port {place.port} of {place.host} the processes of {there} meet",
            where=f"rank {place.rank}",
            hint="start all of them on one run, or set MASTER_PORT to a port that is free",
        )
    return store


def _wait_for_what_came_first(error: BaseException) -> None:
    """Where another process dies, this one fails in the middle of what they do together: the first process
    says whose end it was, and ends this one; or it is gone itself, which the listening thread notices."""
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        time.sleep(FAILED_SECONDS)


def _listen_for(store: Any, place: Place, leaving: threading.Event) -> None:
    """By a thread, which hears also while this process waits in a library, until it is ``leaving`` anyway."""
    # Every thread that begins from now on leaves these signals to the one that waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    leader = place.leader or int(store.get(LEADER_KEY))
    found = None
    if not place.leader:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(leader)
    threading.Thread(target=_listen, args=(leader, found, place, leaving), name="leader", daemon=True).start()


def _listen(leader: int, found: psutil.Process | None, place: Place, leaving: threading.Event) -> None:
    """``found``: the first process, where that is not the one that started this."""
    while os.getppid() == leader if place.leader else found is not None and lives(found):
        if signal.sigtimedwait(STOP_SIGNALS, LOOK_SECONDS) is not None:
            try:
                # As a batch system's warning, which stops and never aborts: the first process may have been
                # sent the same signal itself.
                os.kill(leader, signal.SIGUSR1)
            except ProcessLookupError:
                break
    if leaving.is_set():
        return
    print(f"the first process ({leader}) is gone, and so is rank {place.rank}", file=sys.stderr, flush=True)
    os._exit(int(ExitCode.STOPPED))
