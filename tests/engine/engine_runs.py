"""Runs of the engine that take a second or two, in this process or in one of their own.

The libraries take four seconds to import. So a process that a test may kill is forked from a server that has
imported them already (``start``), unless the test is about starting (``start(..., module=True)``, which is
what users get: ``python -m engine RUN_DIR``).
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from waiting import NOBODY_ASKS, PATIENCE, hears, stands_still, wait_until

from engine.config.loading import load
from engine.config.overrides import apply_overrides
from engine.config.writing import to_toml
from engine.run import event_log, events, generations, launch
from engine.run.directory import RunDirectory

WEIGHTS = "model.safetensors"
E = TypeVar("E", bound=events.Event)

# The smoke preset, shrunk: four blocks, every phase, about a second.
FACTORS: dict[str, object] = {
    "e2e_qp.enabled": False,
    "lr_qat.enabled": True,
    "lr_qat.rank": 8,
    "lr_qat.sequences": 8,
    "lr_qat.val_sequences": 0,
    "lr_qat.sequence_length": 32,
    "lr_qat.batch_size": 4,
    "lr_qat.epochs": 5,
    "lr_qat.lr_factors": 0.1,
}
"""Factors of low rank, behind whatever makes the blocks."""
FROM_LATENTS: dict[str, object] = {
    "e2e_qp.enabled": False,
    "e2e_qat.enabled": True,
    "e2e_qat.start": "latents",
    "e2e_qat.sequences": 8,
    "e2e_qat.val_sequences": 0,
    "e2e_qat.sequence_length": 16,
    "e2e_qat.batch_size": 4,
    "e2e_qat.epochs": 3,
}
"""Whole weights that start at what was rounded."""
SMALL: dict[str, object] = {
    "grid.bits": 3,
    "block_ap.sequences": 4,
    "block_ap.val_sequences": 2,
    "block_ap.batch_size": 2,
    "block_ap.sequence_length": 16,
    "block_ap.epochs": 1,
    "e2e_qp.sequences": 4,
    "e2e_qp.val_sequences": 2,
    "e2e_qp.batch_size": 2,
    "e2e_qp.micro_batch_size": 1,
    "e2e_qp.sequence_length": 16,
    "evaluation.windows": 4,
    "evaluation.batch_size": 2,
    "evaluation.sequence_length": 16,
    "runtime.threads": 1,
    "runtime.device": "cpu",
}


def make_run(runs_dir: Path, overrides: Mapping[str, object] | None = None) -> RunDirectory:
    config = load("smoke", overrides={**SMALL, **(overrides or {})})
    return RunDirectory.create(runs_dir, config)


def run_here(run: RunDirectory, *arguments: str) -> int:
    """An attempt inside this process; its exit code."""
    from engine.__main__ import main

    return main([str(run.path), *arguments])


def change(run: RunDirectory, **overrides: object) -> None:
    """Edit the run's config.toml as a user would."""
    run.config_toml.write_text(to_toml(apply_overrides(run.config(), overrides)))


def local_model(folder: Path) -> Path:
    """The random model of the smoke preset as a folder of files."""
    from safetensors.torch import save_file

    from engine.models.source import ModelSource

    source = ModelSource.open(load("smoke").model)
    source.save_assets(folder)
    save_file({name: source.weights.load(name) for name in source.weights.names()}, folder / WEIGHTS)
    return folder


# -- what a run left behind ----------------------------------------------------------------------------


def log(run: RunDirectory) -> list[events.AnyEvent]:
    return event_log.read_events(run.events_path)[0]


def of(run: RunDirectory, kind: type[E], attempt: int | None = None) -> list[E]:
    """Events of one kind."""
    return [e for e in log(run) if isinstance(e, kind) and attempt in (None, e.attempt)]


def output(run: RunDirectory) -> str:
    """Everything that its processes printed."""
    return "".join(path.read_text() for path in sorted(run.logs_dir.glob("*.log")))


def exported(run: RunDirectory, name: str = "gptq_v2") -> dict[str, str]:
    """SHA-256 of every file of an export."""
    folder = run.export_dir / name
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert any(path.suffix == ".safetensors" for path in files), "there is no export"
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def failure(run: RunDirectory, code: int) -> events.Error:
    """The one error of a run that failed because of the user's input, checked to be presentable."""
    errors = of(run, events.Error)
    assert len(errors) == 1, errors
    error = errors[0]
    finished = of(run, events.RunFinished)[-1]
    assert (finished.outcome, finished.exit_code, error.exit_code) == ("failed", code, code), error
    assert error.message
    assert "\n" not in error.message + error.where + error.hint
    assert "Traceback" not in output(run), output(run)
    return error


def inside(run: RunDirectory, phase: str, attempt: int | None = None) -> list[events.CheckpointCommitted]:
    """Checkpoints in the middle of a training."""
    return [e for e in of(run, events.CheckpointCommitted, attempt) if e.phase == phase and e.step]


def metrics(run: RunDirectory, phase: str, attempt: int) -> list[events.Metric]:
    """What was told of the training."""
    return [e for e in of(run, events.Metric, attempt) if e.phase == phase]


def keeps_a_training(run: RunDirectory) -> bool:
    """Whether what a kill has left is the middle of a training."""
    newest = generations.read_generation(run.checkpoints_dir, generations.newest(run.checkpoints_dir))
    return "training" in newest.entries


# -- processes -----------------------------------------------------------------------------------------


class Child:
    """An engine process."""

    def __init__(self, process: Any, run: RunDirectory) -> None:
        self.process, self.run, self.pid = process, run, int(process.pid)

    def code(self) -> int:
        """Wait for its end; negative for the signal that killed it."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(PATIENCE)
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"still running; {output(self.run)}"
        return int(self.process.exitcode)

    def send(self, number: int) -> None:
        """Send a signal once the process hears it; when this returns, SIGSTOP has taken effect."""
        if number not in NOBODY_ASKS:
            self.until(lambda: hears(self.pid, number))
        os.kill(self.pid, number)
        if number == signal.SIGSTOP:
            wait_until(lambda: stands_still(self.pid))

    def kill(self) -> None:
        """SIGKILL, unless it has just ended by itself: asking before does not tell."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def alive(self) -> bool:
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is None
        return bool(self.process.is_alive())

    def end(self) -> None:
        if self.alive():
            self.process.kill()
        self.code()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something that this process must bring about."""
        wait_until(lambda: condition() or not self.alive())
        assert condition(), f"ended with {self.code()} before; {output(self.run)}"


def start(
    run: RunDirectory,
    *,
    module: bool = False,
    largest_file: int | None = None,
    gpu_bytes: int | None = None,
    die_at: int | None = None,
    arguments: tuple[str, ...] = (),
    before: Callable[[], None] | None = None,
    fullest: Path | None = None,
) -> Child:
    """An engine process on ``run``, its output in the run's log; with limits and arguments, if given.

    ``before``, a function of a module, is called in it first.

    ``die_at`` kills it at the n-th publication point: before and after each rename below its checkpoints and
    its cache. ``fullest`` is a file into which it writes the most bytes that the run's directory ever held.
    """
    if module:
        pid = launch.launch(run, args=arguments)
        return Child(launch._children[pid], run)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engine.pipeline", "engine.reporter", "engine.telemetry"])
    attempt = launch.next_attempt(run)
    limits = {"largest_file": largest_file, "gpu_bytes": gpu_bytes, "die_at": die_at, "fullest": fullest}
    os.umask(umask := os.umask(0o077))  # a process is born with it, but the server has its own
    given = (str(run.path), *arguments)
    process = context.Process(target=_engine, args=(given, attempt, limits, dict(os.environ), umask, before))
    process.start()
    return Child(process, run)


def snapshots_at_any_cost() -> None:
    """In this process: a slow disk does not make checkpoints inside a training rarer.

    For tests that wait for several of them in trainings of a second: what the last one cost would otherwise
    decide whether there is another.
    """
    from engine.checkpoints import snapshots

    snapshots.SNAPSHOT_SHARE = float("inf")  # type: ignore[assignment, misc]


def interrupted_inside(
    run_of: Callable[[], RunDirectory],
    engine: Callable[..., Child],
    ready: Callable[[RunDirectory], object],
    number: int,
) -> RunDirectory:
    """A run that ``number`` ended in the middle of a training, some time after it was ``ready``.

    Where exactly it strikes is decided by the system. Where a training had just ended, it says nothing about
    what is inside one, and there is another try.
    """
    for _ in range(5):
        run = run_of()
        child = engine(run, before=snapshots_at_any_cost)
        child.until(lambda run=run: ready(run))
        child.send(number)
        code = child.code()
        if code == (-number if number == signal.SIGKILL else 75) and keeps_a_training(run):
            return run
    raise AssertionError("five times it was not inside a training")


def _engine(
    given: tuple[str, ...],
    attempt: int,
    limits: dict[str, Any],
    environment: dict[str, str],
    umask: int,
    before: Callable[[], None] | None,
) -> None:
    """The body of a forked engine process: what ``launch`` and ``python -m engine`` do, with warm imports."""
    os.setsid()
    os.umask(umask)
    os.environ.update(environment)
    os.environ[launch.ATTEMPT_VARIABLE] = str(attempt)
    run = RunDirectory.open(given[0])
    descriptor = os.open(launch.log_path(run, attempt), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    largest_file, gpu_bytes = limits["largest_file"], limits["gpu_bytes"]
    if gpu_bytes is not None:
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gpu_bytes / total)
    if limits["die_at"] is not None:
        _die_at(run, limits["die_at"])
    if limits["fullest"] is not None:
        _watch(run, limits["fullest"])
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from engine.__main__ import main

    if before is not None:
        before()
    code = main([*given])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_at(run: RunDirectory, point: int) -> None:
    """In this process: SIGKILL at the n-th publication point."""
    real = os.replace
    folders = (str(run.checkpoints_dir.resolve()), str(run.cache_dir.resolve()))
    seen = 0

    def pass_point() -> None:
        nonlocal seen
        seen += 1
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace(source: Any, target: Any, **options: Any) -> None:
        place = options.get("dst_dir_fd")
        folder = os.readlink(f"/proc/self/fd/{place}") if place is not None else ""
        watched = os.path.abspath(os.path.join(folder, target)).startswith(folders)
        if watched:
            pass_point()
        real(source, target, **options)
        if watched:
            pass_point()

    os.replace = replace


def _watch(run: RunDirectory, fullest: Path) -> None:
    """In this process: write down the most that the run's directory held.

    It is fullest just before something in it goes, so looking then misses nothing, however busy the machine.
    """
    most, one_at_a_time = 0, threading.Lock()

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal most
        if event not in ("os.remove", "os.rename", "os.truncate"):
            return
        with one_at_a_time:
            if (now := held(run.path)) > most:
                most = now
                fullest.write_text(str(most))

    sys.addaudithook(look)


def held(folder: Path) -> int:
    """Bytes of all files below ``folder``, as far as they are still there."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total
