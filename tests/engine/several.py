"""Functions and engines of several processes that are forked from this one: importing the libraries once more
would take longer than all that is tested."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.training.world import World, open_world


def together(size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(world, *arguments)`` gives in each of ``size`` processes, in their order."""
    _may_fork()
    pids = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            _compute(rank, size, folder, function, arguments)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    said = [(folder / f"said-{rank}").read_text() for rank in range(size) if codes[rank]]
    assert not any(codes), "\n".join(said)
    return [pickle.loads((folder / f"found-{rank}").read_bytes()) for rank in range(size)]


def _may_fork() -> None:
    """Where there is a GPU, torch differentiates in threads, which a process forked beside them lacks."""
    if torch.cuda.is_available():
        pytest.skip("torch has threads for GPUs here, which a fork does not have")


def _compute(rank: int, size: int, folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    code = 1
    try:
        from torch.distributed import FileStore  # type: ignore[attr-defined]

        signal.alarm(300)  # one that waits for another that is gone; on a busy machine others take a minute
        world: World = open_world(FileStore(str(folder / "met"), size), rank, size, torch.device("cpu"))
        (folder / f"found-{rank}").write_bytes(pickle.dumps(function(world, *arguments)))
        world.least([0])  # nobody goes while another still reads
        code = 0
    except BaseException:
        (folder / f"said-{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(code)


class Forked:
    """An engine process in the place of one that would import everything anew."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code


def forked_ranks() -> None:
    """In this process, a run's engine: the other ranks are forked."""
    from engine.ranks import others

    def fork(arguments: Sequence[str], environment: dict[str, str], log: int) -> Forked:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return Forked(pid)
        code = 1
        try:
            os.setsid()
            os.environ.update(environment)
            os.dup2(log, 1)
            os.dup2(log, 2)
            from engine.__main__ import main

            code = main([*arguments])
        finally:
            os._exit(code)

    others.start_process = fork
