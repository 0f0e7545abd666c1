"""Another process than the first of a run: it computes its share of what they do together, and keeps nothing.

It hears no request of its own. Signals that reach it are passed on to the first process; when that one is
gone, it goes.
"""

from __future__ import annotations

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
from engine.errors import ExitCode
from engine.failures import as_eqat_error
from engine.phases.joining import Call, Prepared, joined, together
from engine.process import choose_device, prepare_process
from engine.ranks.others import (
    JOINING_KEY,
    LEADER_KEY,
    READY_SECONDS,
    Failure,
    failure_key,
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
    """The exit code, once the first process has no more to do."""
    store = meeting_place(place.host, place.port, place.size, hosts=False)
    _listen_for(store, place)
    report: QuietReporter | None = None
    try:
        device = choose_device(config.runtime.device, config.runtime.gpus, place.local)
        report = QuietReporter(run, attempt, device, place.rank)
        prepare_process(config.runtime, device)
        store.set(ready_key(place.rank), "1")
        while not store.check([JOINING_KEY]):
            time.sleep(READY_SECONDS)
        world = open_world(store, place.rank, place.size, device)
        # By a connection of its own: whoever waits at the other one would keep this waiting.
        told = meeting_place(place.host, place.port, place.size, hosts=False)
        tell = telling(told, place.rank, lambda: world.last_wait)
        telemetry = Telemetry(device, run.path, tell)
        job = joined(run, config, world.told(Prepared), report, device, world)
        while True:
            call = world.told(Call)
            if not call.phase:
                telemetry.close()
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


def _wait_for_what_came_first(error: BaseException) -> None:
    """Where another process dies, this one fails in the middle of what they do together: the first process
    says whose end it was, and ends this one; or it is gone itself, which the listening thread notices."""
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        time.sleep(FAILED_SECONDS)


def _listen_for(store: Any, place: Place) -> None:
    """By a thread, which hears also while this process waits in a library."""
    # Every thread that begins from now on leaves these signals to the one that waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    leader = place.leader or int(store.get(LEADER_KEY))
    threading.Thread(target=_listen, args=(leader, place), name="leader", daemon=True).start()


def _listen(leader: int, place: Place) -> None:
    while not _is_gone(leader, place):
        if signal.sigtimedwait(STOP_SIGNALS, LOOK_SECONDS) is not None:
            try:
                # As a batch system's warning, which stops and never aborts: the first process may have been
                # sent the same signal itself.
                os.kill(leader, signal.SIGUSR1)
            except ProcessLookupError:
                break
    print(f"the first process ({leader}) is gone, and so is rank {place.rank}", file=sys.stderr, flush=True)
    os._exit(int(ExitCode.STOPPED))


def _is_gone(leader: int, place: Place) -> bool:
    if place.leader:  # whoever is killed gives its children away at once
        return os.getppid() != leader
    try:
        return psutil.Process(leader).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
