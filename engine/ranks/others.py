"""The other processes of a run, as the first one sees them: started, joined, watched, ended.

Whatever is kept of a run is kept by the first process, the run's engine: its events, checkpoints and exports.
The others have nothing to lose, so nothing has to be agreed upon to end: when the first one leaves, for
whatever reason, they go. When one of them dies, the first one ends the run with that one's name, from which a
new attempt goes on at the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import psutil
import torch

from engine.errors import EqatError, ExitCode, PreflightError, first_line
from engine.ranks.place import LOCAL_HOST, Place
from engine.ranks.readings import hearing
from engine.reporter import Reporter
from engine.run.directory import RunDirectory
from engine.run.events import Memory
from engine.run.launch import ENGINE, engine_environment, log_path
from engine.system.guarded import open_regular
from engine.training.world import Together, meeting_place, open_world

WATCH_SECONDS = 0.25
GRACE_SECONDS = 15.0
"""In which the first process ends by itself once another is lost; a library may never notice."""
PATIENCE_SECONDS = 30.0
"""For which a stop waits for the end of a step, where another process does not come."""
REASON_SECONDS = 5.0
"""In which another process that ends says why."""
READY_SECONDS = 0.05


class Process(Protocol):
    """One that was started."""

    pid: int

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class Failure(msgspec.Struct, frozen=True):
    """What another process says of its own end."""

    message: str
    where: str
    hint: str
    exit_code: int

    @classmethod
    def of(cls, error: EqatError) -> Failure:
        return cls(error.message, error.where, error.hint, int(error.exit_code))

    def error(self, rank: int) -> EqatError:
        """As the first process says it."""
        where = f"rank {rank}, {self.where}" if self.where else f"rank {rank}"
        return EqatError(self.message, where=where, hint=self.hint, exit_code=ExitCode(self.exit_code))


def failure_key(rank: int) -> str:
    """Under which a process says why it ends."""
    return f"eqat/failure/{rank}"


def ready_key(rank: int) -> str:
    """Under which it says that it is there."""
    return f"eqat/ready/{rank}"


def process_key(rank: int) -> str:
    """Under which it says which process it is."""
    return f"eqat/process/{rank}"


def left_key(rank: int) -> str:
    """Under which it says that it has no more to do."""
    return f"eqat/left/{rank}"


JOINING_KEY = "eqat/joining"
"""Under which the first process says that it joins the others: until then, however long it prepares the run,
none of them may wait in a library that loses patience."""
RUN_KEY = "eqat/run"
LEADER_KEY = "eqat/leader"
"""Under which the first process says of which run it is, and then which process."""


def start_process(arguments: Sequence[str], environment: dict[str, str], log: int) -> Process:
    """An engine process of its own, which prints into ``log``."""
    # It is signalled and watched by number, and shares nothing else with this one.
    return subprocess.Popen(
        [sys.executable, *ENGINE, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
    )


class Others:
    """All but this first process."""

    def __init__(
        self, size: int, device: torch.device, store: Any, watched: Any, processes: dict[int, Process]
    ) -> None:
        """``processes`` are those that were started here: none, or all. ``store`` is where all meet,
        ``watched`` the same by a connection of its own: whoever waits at the one would keep whoever watches
        waiting."""
        self.size, self.device, self.store, self.processes = size, device, store, processes
        self._watched = watched
        self._found: dict[int, psutil.Process] = {}
        """Those that something else has started, as far as they have said which they are."""
        self.failure: EqatError | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._report: Reporter | None = None
        self._world: Together | None = None

    # Watching

    def watch(self, report: Reporter, end: Callable[[EqatError], None]) -> None:
        """From now on look whether they live. Once one does not, whatever this process waits for ends with
        that; ``end`` is called where it does not come back from there."""
        self._report = report
        self._thread = threading.Thread(target=self._keep_watching, args=(end,), name="ranks", daemon=True)
        self._thread.start()

    def _keep_watching(self, end: Callable[[EqatError], None]) -> None:
        while not self._closing.wait(WATCH_SECONDS):
            self.failure = self._look()
            if self.failure is not None:
                if not self._closing.wait(GRACE_SECONDS):
                    end(self.failure)
                return

    def _look(self) -> EqatError | None:
        """Why the first that has ended did."""
        ended = {rank: process.poll() for rank, process in self.processes.items()}
        for rank in range(1, self.size):
            if self._watched.check([failure_key(rank)]):
                said: bytes = self._watched.get(failure_key(rank))
                return msgspec.json.decode(said, type=Failure).error(rank)
        for rank, code in ended.items():
            if code and not self._closing.is_set():
                return _died(rank, self.processes[rank].pid, code)
        return None if self.processes else self._look_for_those_found()

    def _look_for_those_found(self) -> EqatError | None:
        """Whoever started them may not mind that one is gone, and nobody says how it went."""
        for rank in range(1, self.size):
            if rank not in self._found and self._watched.check([process_key(rank)]):
                try:
                    self._found[rank] = psutil.Process(int(self._watched.get(process_key(rank))))
                except psutil.NoSuchProcess as gone:
                    return _is_gone(rank, gone.pid)
        for rank, process in self._found.items():
            # In this order: it says so before it goes.
            if not lives(process) and not self._watched.check([left_key(rank)]):
                return _is_gone(rank, process.pid)
        return None

    def why(self, error: BaseException) -> BaseException:
        """``error``, or the end of another process if it came of that."""
        if isinstance(error, EqatError) or not isinstance(error, RuntimeError):
            return error
        until = time.monotonic() + REASON_SECONDS
        while self.failure is None and time.monotonic() < until:
            self.failure = self._look()
            time.sleep(READY_SECONDS)
        return self.failure or error

    def hear(self, waited: float) -> None:
        """While this process has waited so long for the others."""
        if self.failure is not None:
            raise self.failure
        assert self._report is not None
        stop = self._report.stop_asked()
        if stop is not None and (stop.abort or waited > PATIENCE_SECONDS):
            raise stop

    # Joining

    def join(self) -> Together:
        """Once all of them are there."""
        assert self._report is not None
        self._report.doing = "waiting for the other processes"
        began = time.monotonic()
        while not self.store.check([ready_key(rank) for rank in range(1, self.size)]):
            time.sleep(READY_SECONDS)
            self.hear(time.monotonic() - began)
        self.store.set(JOINING_KEY, "1")
        self._world = open_world(self.store, 0, self.size, self.device, self.hear)
        return self._world

    def with_readings(self, emit: Callable[[Memory], None]) -> Callable[[Memory], None]:
        """For a reading of this process: ``emit`` it with those of the others."""

        def waited() -> float | None:
            return None if self._world is None else self._world.last_wait

        return hearing(self._watched, self.size, waited, emit)

    def close(self) -> None:
        """End them: what they know, this process knows."""
        self._closing.set()
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        for process in self.processes.values():
            process.wait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)


def _died(rank: int, pid: int, code: int) -> EqatError:
    if code >= 0:
        how = f"ended with exit code {code}"
    else:
        try:
            how = f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            how = f"was ended by signal {-code}"
    return _lost(f"rank {rank} (process {pid}) {how}")


def _is_gone(rank: int, pid: int) -> EqatError:
    return _lost(f"rank {rank} (process {pid}) is gone")


def _lost(message: str) -> EqatError:
    return EqatError(
        message,
        where="runtime.gpus",
        hint="the kernel does that where memory is short; resume the run: what was checkpointed is kept",
        exit_code=ExitCode.KILLED,
    )


def lives(process: psutil.Process) -> bool:
    """Whether it does; one that ended, and whose parent has not asked yet how, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def begin(
    run: RunDirectory,
    arguments: Sequence[str],
    attempt: int,
    size: int,
    device: torch.device,
    place: Place | None,
) -> Others:
    """Start the others, which are given the engine's ``arguments``; those of ``place`` are there already.

    Raises:
        PreflightError: where the place at which those are to meet is somebody else's.
    """
    host = LOCAL_HOST if place is None else place.host
    port, restarts = (0, 0) if place is None else (place.port, place.restarts)
    try:
        hosts = place is None or _hosts()
        store = meeting_place(host, port, size, hosts=hosts, restarts=restarts)
    except RuntimeError as error:
        raise PreflightError(
            f"the processes cannot meet at port {port} of {host}: {first_line(error)}",
            where="MASTER_PORT",
            hint="where another program has it, set MASTER_PORT to one that is free",
        ) from error
    store.set(RUN_KEY, run.id)
    store.set(LEADER_KEY, str(os.getpid()))
    if place is None:
        port = store.port
    processes: dict[int, Process] = {}
    for rank in range(1, size) if place is None else ():
        environment = {
            **engine_environment(attempt),
            **Place(rank, size, rank, host, port, os.getpid()).variables(),
        }
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        log = open_regular(log_path(run, attempt, rank), flags, root=run.path)
        try:
            processes[rank] = start_process([str(run.path), *arguments], environment, log)
        finally:
            os.close(log)
    watched = meeting_place(host, port, size, hosts=False, restarts=restarts)
    return Others(size, device, store, watched, processes)


def _hosts() -> bool:
    """Whether the first process has the place where all meet; torchrun may have it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() != "true"
